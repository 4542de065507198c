"""How fast each layer learns, next to the others."""

from typing import Any

from torch import nn


def parameter_groups(network: nn.Module, reference_fan_in: float) -> list[dict[str, Any]]:
    """An optimizer's groups of parameters, each with a ``multiplier`` of the learning rate.

    Adam's first step moves every weight by the learning rate, later ones by about that or less,
    however small the weights are and however many a unit sums up. With n inputs to a unit (its
    fan-in), weights have the multiplier ``reference_fan_in`` / n here, in all Conv2d and Linear
    layers but the first; all other parameters have 1.

    Args:
        network: any modules; its layers in the order of ``network.modules()``.
        reference_fan_in: above 0, the n whose multiplier is 1; 0 for a multiplier of 1 everywhere.

    Source: Yang et al. 2022, "Tensor Programs V", table 3, where widths alone vary: Adam's
    learning rate of hidden and output weights is proportional to 1 / n, that of input weights and
    biases is the same for all n.

    >>> network = nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 10))
    >>> groups = parameter_groups(network, reference_fan_in=100)
    >>> [(len(group["params"]), group["multiplier"]) for group in groups]
    [(3, 1.0), (1, 0.5)]
    """
    multipliers: dict[nn.Parameter, float] = {}
    if reference_fan_in > 0:
        layers = [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
        for layer in layers[1:]:
            multipliers[layer.weight] = reference_fan_in / layer.weight[0].numel()
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in network.parameters():
        groups.setdefault(multipliers.get(parameter, 1.0), []).append(parameter)
    return [{"params": params, "multiplier": factor} for factor, params in groups.items()]
