"""Layer-wise training (paper, A.6): a frozen beginning of a network, and the rest of it."""

from torch import nn

from robust_app.errors import SettingError
from robust_app.layer_rules import flattened


def trainable_layers(network: nn.Module) -> list[int]:
    """Where the convolutions and linear layers stand among the network's layers."""
    return [
        position
        for position, layer in enumerate(flattened(network))
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]


def split(network: nn.Module, stage: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The layers before the input of a stage, and those after it; parameters are shared.

    Args:
        network: nested Sequentials.
        stage: number of convolutions and linear layers to put in the first part; 0 leaves the
            first part empty.

    Raises:
        SettingError: the stage leaves no layer to train.

    >>> before, after = split(nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 3)), stage=1)
    >>> len(before), len(after)
    (2, 1)
    """
    layers, positions = flattened(network), trainable_layers(network)
    if not 0 <= stage < len(positions):
        raise SettingError(
            "stages",
            f"expected at most {len(positions) - 1}, which leaves one of the network's "
            f"{len(positions)} layers to train, found {stage}",
        )
    cut = positions[stage] if stage else 0
    return nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])
