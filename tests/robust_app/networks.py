"""Layers and networks by hand and points of boxes, for the tests of bounds."""

import torch
from torch import nn

from robust_app.batch_norm import BatchNorm
from robust_app.models import build

DIGITS = (1, 8, 8)


def points(box, count=6):
    """Both extreme corners, random corners and random points of a box."""
    yield box.lower
    yield box.upper
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        direction = 2 * torch.rand(box.center.shape, generator=generator, dtype=torch.float64) - 1
        yield box.center + box.radius * direction
        yield box.center + box.radius * direction.sign()


def linear(weight, bias):
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def scaled(layer):
    """With weights that are not the initial ones, some of them negative."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1.5, 2, len(layer.weight)))
        layer.bias.copy_(torch.linspace(0.5, -0.3, len(layer.weight)))
    return layer


def digits_network(seed=0):
    torch.manual_seed(seed)
    network = build("digits-cnn", DIGITS, 10, mean=[0.4], std=[0.3], batch_norm=True).double()
    for layer in network:
        if isinstance(layer, BatchNorm):
            scaled(layer)
    return network


def images(count=6, seed=0):
    return randn(count, *DIGITS, seed=seed).sigmoid()
