"""Bounds of some images' margins, and the stages that tighten them: linear relaxations in float64.

Sources: CROWN, Zhang et al. 2018; optimised slopes, Xu et al. 2021.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robust_app.certificates import (
    computed_margins,
    enclose,
    enclosures,
)
from robust_app.crown_margins import margin_bound
from robust_app.interval import Interval
from robust_app.pullback import LinearBound
from robust_app.relaxation import Trace, is_relu, lower_bounds
from robust_app.slopes import ascended, tightened

ELEMENTS = 2**23
"""Values of all layers together that are bounded at a time; some twenty float64 for each."""


@dataclass(frozen=True)
class Problem:
    """What is known about some images, in float64.

    Attributes:
        trace: the layers, with the boxes of computed values at their inputs.
        labels: the classes y, int64 ``(batch,)``.
        errors: what rounding after the last layer may take from a margin, ``(batch, classes)``.
        margins: the best lower bounds of the computed z_y - z_j so far, ``(batch, classes)``; inf
            for j = y.
    """

    trace: Trace
    labels: Tensor
    errors: Tensor
    margins: Tensor

    @classmethod
    def of(cls, network: nn.Module, box: Interval, labels: Tensor) -> "Problem":
        """What interval bounds know; the network is :func:`~.plain_networks.in_float64`."""
        trace = tuple(enclosures(network, box))
        margins, errors = computed_margins(*trace[-1], labels)
        return cls(trace, labels, errors, margins)

    @property
    def proved(self) -> Tensor:
        """Whether all margins of an image are above 0, bool ``(batch,)``."""
        return (self.margins > 0).all(1)

    def only(self, images: Tensor) -> "Problem":
        """The same for a choice of the images, by index or mask."""
        trace = [(layer, box.select(images)) for layer, box in self.trace]
        return Problem(trace, self.labels[images], self.errors[images], self.margins[images])


Tightening = Callable[[Problem], Problem]
"""A stage: the same problem with better bounds."""


def relax(problem: Problem) -> Problem:
    """Bound the open margins by one pass back, with CROWN's adaptive slopes."""
    return _improved(problem, lower_bounds)


def optimize(problem: Problem) -> Problem:
    """Bound the open margins with slopes optimised for each: :func:`~robust_app.slopes.ascended`.

    The boxes at the ReLUs are not optimised.
    """
    return _improved(problem, ascended)


def tighten(problem: Problem) -> Problem:
    """Bound the ReLUs' inputs by passes back too, where their sign is open.

    From the first layer to the last, each with the tighter boxes before it, and within the
    interval bounds from those. Before the first ReLU the interval bounds stay.
    """
    layers = [layer for layer, _ in problem.trace]
    trace: list[tuple[nn.Module, Interval]] = [problem.trace[0]]
    for layer in layers[1:]:
        box: Interval = enclose(*trace[-1])
        if is_relu(layer) and any(map(is_relu, layers[: len(trace)])):
            box = tightened(trace, box, rows_at_once(trace))
        trace.append((layer, box))
    margins, errors = computed_margins(*trace[-1], problem.labels)
    margins = torch.maximum(problem.margins, margins)
    return replace(problem, trace=trace, errors=errors, margins=margins)


def _improved(problem: Problem, bounds: Callable[[Trace, LinearBound, Tensor], Tensor]) -> Problem:
    margins = problem.margins.clone()
    open_pairs = (margins > 0).logical_not().nonzero()
    for pairs in torch.split(open_pairs, rows_at_once(problem.trace)):
        images, others = pairs.unbind(1)
        labels = problem.labels[images]
        bound = margin_bound(margins, labels.unsqueeze(1), others.unsqueeze(1))
        bound = replace(bound, constant=-problem.errors[images, others].unsqueeze(1))
        found = bounds(problem.trace, bound, images).squeeze(1)
        margins[images, others] = torch.maximum(margins[images, others], found)
    return replace(problem, margins=margins)


def rows_at_once(trace: Trace) -> int:
    """How many rows of bounds a pass may have, for its memory's sake."""
    return max(1, ELEMENTS // sum(math.prod(box.center.shape[1:]) for _, box in trace))


TIGHTEST: Sequence[Tightening] = (relax, optimize, tighten, relax, optimize)
"""Prove all that any stages here do."""
