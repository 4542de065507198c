"""Linear relaxation of the ReLU, and the pass that carries bounds back to the image.

A linear function of a layer's outputs is bounded from below by one of its inputs, layer by layer
down to the image, where its minimum over the box has a closed form (CROWN, Zhang et al. 2018).
Affine layers are exact; a ReLU is relaxed to lines that depend on the box at its input: any sound
boxes will do. Bounds hold up to the rounding of floating-point arithmetic; in float64, with the
boxes of computed values of :mod:`robust_app.certificates`, they hold with it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_app.fused import split_by_sign
from robust_app.interval import Computed, Interval
from robust_app.layer_rules import by_rule, is_plainly
from robust_app.pullback import LinearBound, inner_products, pull_back

Trace = Sequence[tuple[nn.Module, Interval]]
"""The layers of a plain chain, each with the box at its input: of ``margins.layer_inputs``."""


def lower_bounds(
    trace: Trace,
    bound: LinearBound,
    images: Tensor | None = None,
    slopes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Minima over the first box of linear functions of the last layer's outputs, from below.

    Args:
        trace: at least one layer; of the boxes, those at the ReLUs and at the first layer are
            used, and the rounding errors of all.
        bound: the functions, ``(batch, spec)`` of them.
        images: for each row of ``bound`` the index of its boxes, int64 ``(batch,)``; by default
            row i has the boxes i.
        slopes: for each ReLU in order the slopes in [0, 1] of its lower line,
            ``(batch, *shape)``, all of them sound; by default those of :func:`adaptive_slopes`.

    Returns:
        ``(batch, spec)``.

    Raises:
        UnsupportedLayer: a layer is neither affine with a rule of :func:`pull_back` nor a ReLU.

    >>> box = Interval.between(torch.tensor([[-1.0]]), torch.tensor([[3.0]]))
    >>> minus_one = LinearBound(torch.tensor([[[-1.0]]]), torch.zeros(1, 1))
    >>> lower_bounds([(nn.ReLU(), box)], minus_one)
    tensor([[-3.]])
    """
    remaining = None if slopes is None else list(slopes)
    for layer, box in reversed(trace):
        box = box if images is None else box.select(images)
        if is_relu(layer):
            lower_slopes = adaptive_slopes(box) if remaining is None else remaining.pop()
            bound = relax_relu(bound, box, lower_slopes)
        else:
            bound = by_rule(pull_back, layer, bound, box.center.shape[1:])
        bound = before_rounding(bound, box)

    coefficients = bound.coefficients
    return (
        bound.constant
        + inner_products(coefficients, box.center)
        - inner_products(coefficients.abs(), box.radius)
    )


def before_rounding(bound: LinearBound, box: Interval) -> LinearBound:
    """Bounds in what a layer makes in real numbers, from bounds in what it computes.

    Args:
        bound: in the layer's outputs, ``(batch, spec, *shape)``.
        box: of these, ``(batch, *shape)``.
    """
    return LinearBound(bound.coefficients, bound.constant - rounding(bound, box))


def rounding(function: LinearBound, box: Interval) -> Tensor:
    """What the rounding of values changes linear functions of them by, at most: ``(batch, spec)``.

    Zero, unless the values' box is :class:`~robust_app.interval.Computed`.
    """
    if not isinstance(box, Computed) or box.error is None:
        return torch.zeros_like(function.constant)
    return inner_products(function.coefficients.abs(), box.error)


def adaptive_slopes(box: Interval) -> Tensor:
    """CROWN's slopes: the identity where it is nearer to the ReLU in area than zero, else zero.

    >>> adaptive_slopes(Interval(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0])))
    tensor([0., 1.])
    """
    return (box.upper > -box.lower).to(box.center)


def relax_relu(bound: LinearBound, box: Interval, slopes: Tensor) -> LinearBound:
    """Bounds in a ReLU's inputs from bounds in its outputs.

    Where the sign of an input z is open, αz <= ReLU(z) <= u(z - l)/(u - l) on [l, u].

    Args:
        bound: in the outputs, ``(batch, spec, *shape)``.
        box: of the inputs, ``(batch, *shape)``.
        slopes: α in [0, 1], ``(batch, *shape)``; unused where the sign is known.
    """
    lower, upper = box.lower, box.upper
    unstable = (lower < 0) & (upper > 0)
    stable_slope = (lower >= 0).to(lower)
    # No division where there is nothing to relax: it would put NaN into the gradient.
    chord_slope = torch.where(
        unstable, upper / torch.where(unstable, upper - lower, 1), stable_slope
    )
    intercept = torch.where(unstable, -chord_slope * lower, 0)
    slopes = torch.where(unstable, slopes, stable_slope)

    coefficients, constant = split_by_sign(
        bound.coefficients.flatten(2),
        *(values.flatten(1) for values in (slopes, chord_slope, intercept)),
    )
    return LinearBound(coefficients.view_as(bound.coefficients), bound.constant + constant)


def is_relu(layer: nn.Module) -> bool:
    """Whether a layer is a ReLU, and no subclass that computes something else."""
    return is_plainly(layer, nn.ReLU)
