"""The networks by name: data that describe them, and the builder of plain ``nn.Sequential``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from robust_app.errors import UserError, unknown
from robust_app.layers import Normalize


@dataclass(frozen=True)
class Conv:
    """A square convolution with padding 1, then ReLU: the paper's "Conv k w×h+s"."""

    channels: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"Conv {self.channels} {self.kernel}×{self.kernel}+{self.stride}"


@dataclass(frozen=True)
class Dense:
    """A fully connected layer, then ReLU: the paper's "FC n"."""

    units: int

    def __str__(self) -> str:
        return f"FC {self.units}"


@dataclass(frozen=True)
class Architecture:
    """The hidden layers of a network: convolutions, then dense layers.

    As text it is in the paper's notation, without the last layer:

    >>> print(MODELS["dm-small"])
    Conv 16 4×4+2, Conv 32 4×4+1, FC 100
    """

    description: str
    convolutions: tuple[Conv, ...]
    dense: tuple[Dense, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, (*self.convolutions, *self.dense)))


# The paper's Table E leaves the padding open; 1 is what its sources [8, 31] use.
MODELS: Mapping[str, Architecture] = {
    "dm-small": Architecture(
        "the paper's DM-Small (Table E)",
        (Conv(16, 4, 2), Conv(32, 4, 1)),
        (Dense(100),),
    ),
    "dm-medium": Architecture(
        "the paper's DM-Medium (Table E)",
        (Conv(32, 3, 1), Conv(32, 4, 2), Conv(64, 3, 1), Conv(64, 4, 2)),
        (Dense(512), Dense(512)),
    ),
    "dm-large": Architecture(
        "the paper's DM-Large (Table E)",
        (Conv(64, 3, 1), Conv(64, 3, 1), Conv(128, 3, 2), Conv(128, 3, 1), Conv(128, 3, 1)),
        (Dense(512),),
    ),
    "digits-cnn": Architecture(
        "a small network for the 8×8 digits, trained in seconds",
        (Conv(16, 3, 1), Conv(32, 4, 2)),
        (Dense(64),),
    ),
}


def build(
    name: str,
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build a network with torch's default initialisation.

    Args:
        name: a key of :data:`MODELS`.
        input_shape: ``(C, H, W)`` of one image.
        classes: number of outputs of the last linear layer, at least 2.
        mean: with ``std``, one number per channel for a leading
            :class:`~robust_app.layers.Normalize`; no such layer without them.
        std: see ``mean``.

    Returns:
        A flat sequence from images ``(batch, C, H, W)`` to logits ``(batch, classes)``.

    Raises:
        UserError: the name is unknown, the image too small for the network or ``classes`` below 2.
        ValueError: ``mean`` and ``std`` do not fit each other or the channels.

    >>> build("digits-cnn", (1, 8, 8), classes=10)[-1]
    Linear(in_features=64, out_features=10, bias=True)
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, got {classes}")
    architecture = MODELS[name]
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    if mean is not None or std is not None:
        if mean is None or std is None or len(mean) != channels:
            raise ValueError(
                f"mean and std must both have {channels} entries, one per channel,"
                f" got mean={mean} and std={std}"
            )
        layers.append(Normalize(mean, std))

    for conv in architecture.convolutions:
        height, width = (_output_size(size, conv) for size in (height, width))
        if min(height, width) < 1:
            raise UserError(
                f"images of {input_shape[1]}×{input_shape[2]} pixels are too small for {name}"
            )
        layers += [nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, 1), nn.ReLU()]
        channels = conv.channels

    layers.append(nn.Flatten())
    features = channels * height * width
    for dense in architecture.dense:
        layers += [nn.Linear(features, dense.units), nn.ReLU()]
        features = dense.units
    return nn.Sequential(*layers, nn.Linear(features, classes))


def _output_size(size: int, conv: Conv) -> int:
    return (size + 2 - conv.kernel) // conv.stride + 1
