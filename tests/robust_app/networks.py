"""Layers by hand and points of boxes, for the tests of bounds."""

import torch
from torch import nn


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
