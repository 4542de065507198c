"""Bounds of the margins over a box (paper, section 2)."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_app.bounds import propagate
from robust_app.interval import Interval
from robust_app.layer_rules import flattened, is_plainly
from robust_app.precision import without_autocast


def margin_bounds(network: nn.Module, interval: Interval, labels: Tensor) -> Tensor:
    """Lower bounds of the margins z_y - z_j over a box (paper, section 2).

    A last linear layer is merged with the margins' specification, so that a margin is one
    affine function of the last hidden box; this is never looser than bounding the logits first.
    Differentiable with respect to the parameters.

    Args:
        network: from the box's shape to logits ``(batch, classes)``, all layers with a rule.
        interval: boxes ``(batch, ...)``, as of :meth:`Interval.around`.
        labels: the classes y, int64 ``(batch,)``.

    Returns:
        ``(batch, classes)``, m of the paper with 0 in column y.

    Raises:
        UnsupportedLayer: see :func:`robust_app.bounds.propagate`.
        ValueError: the logits are not of shape ``(batch, classes)`` or the labels not ``(batch,)``.

    >>> box = Interval.around(torch.full((1, 2), 0.5), 0.25)
    >>> margin_bounds(nn.Identity(), box, torch.tensor([0]))
    tensor([[ 0.0000, -0.5000]])
    """
    *_, (last, hidden) = layer_inputs(network, interval)
    return margins_after(last, hidden, labels)


def layer_inputs(
    network: nn.Module,
    interval: Interval,
    through: Callable[[nn.Module, Interval], Interval] = propagate,
) -> Iterator[tuple[nn.Module, Interval]]:
    """Each layer of the network, nested Sequentials unrolled, with the box at its input.

    A box is computed when it is asked for: that after the last layer never is.

    Args:
        network: whose layers all have a rule.
        interval: the box at the first.
        through: takes a box through a layer.

    Raises:
        UnsupportedLayer: see :func:`robust_app.bounds.propagate`.

    >>> box = Interval.around(torch.full((1, 2), 0.5), 0.25)
    >>> [type(layer).__name__ for layer, _ in layer_inputs(nn.Sequential(nn.ReLU()), box)]
    ['ReLU']
    """
    layers = flattened(network) or [nn.Identity()]
    yield layers[0], interval
    for before, layer in pairwise(layers):
        interval = through(before, interval)
        yield layer, interval


def margins_after(last: nn.Module, hidden: Interval, labels: Tensor) -> Tensor:
    """:func:`margin_bounds` of a network's last layer alone, from the box at its input.

    Its sums of many radii are taken without autocast.
    """
    with without_autocast(hidden.center, hidden.radius) as (center, radius):
        return _margins_after(last, Interval(center, radius), labels)


def _margins_after(last: nn.Module, hidden: Interval, labels: Tensor) -> Tensor:
    if is_plainly(last, nn.Linear):
        logits, weight = last(hidden.center), last.weight
    else:
        hidden = propagate(last, hidden)
        logits = hidden.center
        weight = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "expected logits of shape (batch, classes) and labels of shape (batch,),"
            f" got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )

    classes = len(weight)
    # The radii for all pairs (y, j) in one product: for few classes much cheaper than a
    # weight matrix W_y - W_j for each example.
    differences = (weight.unsqueeze(1) - weight).abs().flatten(0, 1)
    radii = F.linear(hidden.radius, differences).view(-1, classes, classes)
    radius = radii.gather(1, labels.view(-1, 1, 1).expand(-1, 1, classes)).squeeze(1)
    margins: Tensor = logits.gather(1, labels.unsqueeze(1)) - logits - radius
    return margins
