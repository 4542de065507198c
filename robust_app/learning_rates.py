"""How fast each layer learns, next to the others."""

from typing import Any

from torch import nn


def parameter_groups(network: nn.Module, reference_fan_in: float) -> list[dict[str, Any]]:
    """An optimizer's groups of parameters; each has a ``share`` of the learning rate.

    Adam moves every weight by about the learning rate in each step, however many of them a unit
    sums up. With n inputs to a unit (its fan-in), the weights of a Conv2d or Linear layer have the
    share ``reference_fan_in`` / n here, so that a step changes the units of all layers by as much;
    and initial weights of :func:`robust_app.initialization.ibp_initialization`, whose standard
    deviation is √(2π) / n, by the same part of it. Biases and BatchNorm have a share of 1.

    Args:
        network: any modules.
        reference_fan_in: the n above 0 of which the share is 1; or 0, for a share of 1 of all.

    Source: Yang et al. 2022, "Tensor Programs V", whose table 3 has it for Adam and all layers but
    the first.

    >>> network = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 10))
    >>> [(len(group["params"]), group["share"]) for group in parameter_groups(network, 100)]
    [(1, 2.0), (2, 1.0), (1, 0.5)]
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    shares = {
        layer.weight: reference_fan_in / layer.weight[0].numel()
        for layer in layers
        if reference_fan_in > 0
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in network.parameters():
        groups.setdefault(shares.get(parameter, 1.0), []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]
