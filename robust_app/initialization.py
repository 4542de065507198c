"""Weights under which the bounds of a network neither grow nor shrink from layer to layer."""

import math

import torch
from torch import nn


@torch.no_grad()
def ibp_initialization(network: nn.Module) -> None:
    """Draw the weights of all Conv2d and Linear layers but the last from N(0, σ), in place.

    With n inputs to a unit (its fan-in) and σ = √(2π) / n, the absolute weights of a unit sum to
    n · σ√(2/π) = 2 on average, and a ReLU halves the mean radius of boxes centred around 0: mean
    radii stay as they are from one ReLU's input to the next one's. Biases, which move no radius,
    and the last layer keep torch's default, as in the authors' code. Weights are drawn from
    torch's global generator, in the order of ``network.modules()``.

    Args:
        network: any modules; what is neither Conv2d nor Linear is left alone.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", section 4.1.

    >>> network = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
    >>> ibp_initialization(network)
    >>> 1.9 < network[0].weight.abs().sum(1).mean() < 2.1
    tensor(True)
    """
    weighted = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in weighted[:-1]:
        nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
