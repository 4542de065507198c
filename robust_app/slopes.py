"""Tighter relaxation of the ReLUs of some images: better boxes, better slopes."""

from dataclasses import replace

import torch
from torch import Tensor

from robust_app.interval import Interval
from robust_app.pullback import LinearBound
from robust_app.relaxation import Trace, adaptive_slopes, before_rounding, is_relu, lower_bounds

ITERATIONS = 30
"""Steps of the slopes' ascent."""

STEP = 0.25
"""Length of the first step of a slope; they shrink linearly."""


def tightened(trace: Trace, box: Interval, rows_at_once: int) -> Interval:
    """The box after the layers of ``trace``, bounded anew where it has 0 inside.

    Args:
        trace: layers and boxes.
        box: bounds of the last layer's outputs, ``(batch, ...)``; the result lies within.
        rows_at_once: neurons, of any image, that are bounded in one pass.
    """
    shape = box.center.shape
    lower, upper = box.lower.flatten(1), box.upper.flatten(1)
    unstable = ((lower < 0) & (upper > 0)).nonzero()
    for pairs in torch.split(unstable, rows_at_once):
        images, neurons = pairs.unbind(1)
        rows = torch.arange(len(pairs), device=lower.device)
        coefficients = lower.new_zeros(len(pairs), 2, lower.shape[1])
        coefficients[rows, 0, neurons] = 1
        coefficients[rows, 1, neurons] = -1
        both = LinearBound(coefficients.view(-1, 2, *shape[1:]), lower.new_zeros(len(pairs), 2))
        both = before_rounding(both, box.select(images))
        below, above = lower_bounds(trace, both, images).unbind(1)
        lower[images, neurons] = torch.maximum(lower[images, neurons], below)
        upper[images, neurons] = torch.minimum(upper[images, neurons], -above)
    # Of two bounds that meet, rounding may put the upper one below.
    tighter = Interval.between(lower.view(shape), torch.maximum(lower, upper).view(shape))
    return replace(box, center=tighter.center, radius=tighter.radius)


@torch.enable_grad()
def ascended(trace: Trace, bound: LinearBound, images: Tensor) -> Tensor:
    """:func:`lower_bounds`, the best over the ReLUs' lower slopes that an ascent comes by.

    Each row has its own slope for each neuron, from the adaptive ones on, and takes steps along
    the sign of the gradient until its bounds are above 0. The boxes at the ReLUs, hence the upper
    lines, stay as they are. Never looser than the start.

    Args:
        trace: layers and boxes.
        bound: the functions, ``(batch, spec)`` of them.
        images: for each row of ``bound`` the index of its boxes, int64 ``(batch,)``.

    Returns:
        ``(batch, spec)``, detached.
    """
    best = bound.constant.new_full(bound.constant.shape, -torch.inf)
    slopes = [adaptive_slopes(box.select(images)) for layer, box in trace if is_relu(layer)]
    if not slopes:
        return lower_bounds(trace, bound, images).detach()
    rows = torch.arange(len(best), device=best.device)
    for iteration in range(ITERATIONS):
        slopes = [slope.requires_grad_() for slope in slopes]
        found = lower_bounds(trace, bound, images, slopes)
        gradients = torch.autograd.grad(found.sum(), slopes)
        best[rows] = torch.maximum(best[rows], found.detach())

        still = (best[rows] <= 0).all(1)
        if not still.any():
            break
        size = STEP * (1 - iteration / ITERATIONS)
        slopes = [
            (slope.detach() + size * gradient.sign())[still].clamp(0, 1)
            for slope, gradient in zip(slopes, gradients, strict=True)
        ]
        rows, images = rows[still], images[still]
        bound = LinearBound(bound.coefficients[still], bound.constant[still])
    return best
