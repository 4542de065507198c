"""How fast each layer learns, next to the others."""

from typing import Any

from torch import Tensor, nn


def parameter_groups(network: nn.Module, reference_fan_in: float) -> list[dict[str, Any]]:
    """An optimizer's groups of parameters, each with a ``multiplier`` of the learning rate.

    Adam's first step moves every weight by the learning rate, later ones by about that or less,
    however small the weights are and however many a unit sums up. With n inputs to a unit (its
    fan-in), the weights of Conv2d and Linear layers have the multiplier ``reference_fan_in`` / n
    here; all other parameters have 1. So the first step moves weights of
    :func:`robust_app.initialization.ibp_initialization`, whose standard deviation is √(2π) / n, by
    the same part of it in all layers.

    Args:
        network: any modules.
        reference_fan_in: above 0, the n whose multiplier is 1; 0 for a multiplier of 1 everywhere.

    Source: Yang et al. 2022, "Tensor Programs V", table 3: Adam's learning rate of hidden and
    output weights in proportion to 1 / n. There the first layer is exempt, as its n does not
    grow with the width; here its n is one of the differences to even out.

    >>> network = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 10))
    >>> groups = parameter_groups(network, reference_fan_in=100)
    >>> [(len(group["params"]), group["multiplier"]) for group in groups]
    [(1, 2.0), (2, 1.0), (1, 0.5)]
    """
    multipliers: dict[Tensor, float] = {}
    if reference_fan_in > 0:
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                multipliers[layer.weight] = reference_fan_in / layer.weight[0].numel()
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in network.parameters():
        groups.setdefault(multipliers.get(parameter, 1.0), []).append(parameter)
    return [{"params": params, "multiplier": factor} for factor, params in groups.items()]
