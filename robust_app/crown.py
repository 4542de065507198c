"""CROWN-IBP margins for training, and verifiers tighter than interval bounds.

``crown_ibp``, ``alpha_crown_ibp``, ``crown`` and ``alpha_crown`` run through stages, each for the
images that those before it left open. All take a network in evaluation mode, images in [0, 1]
``(batch, ...)``, their classes, int64 ``(batch,)``, and ε >= 0 in pixels of [0, 1], and return
booleans ``(batch,)``: true where each margin over another class, as float32 computes it, is proved
to be above 0 (:mod:`robust_app.certificates`). What one stage proves stays proved, so ``crown_ibp``
proves all that interval bounds prove, ``crown`` and ``alpha_crown_ibp`` all that ``crown_ibp``
does, ``alpha_crown`` all that any does. Sources: CROWN, Zhang et al. 2018; CROWN-IBP, Zhang et al.
2020; optimised slopes, Xu et al. 2021.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robust_app.certificates import (
    as_network,
    ball,
    check_labels,
    computed_margins,
    enclose,
    enclosures,
    in_float64,
    margin_errors,
)
from robust_app.interval import Interval, check_images
from robust_app.margins import layer_inputs
from robust_app.precision import plain_float32, without_autocast
from robust_app.pullback import LinearBound
from robust_app.relaxation import Trace, is_relu, lower_bounds
from robust_app.slopes import ascended, tightened

ELEMENTS = 2**23
"""Values of all layers together that are bounded at a time; some twenty float64 for each."""


def crown_ibp_margins(network: nn.Module, interval: Interval, labels: Tensor) -> Tensor:
    """CROWN-IBP lower bounds of the margins z_y - z_j over a box (Zhang et al. 2020).

    Interval bounds at the ReLUs, then one backward pass for all margins at once. Differentiable
    with respect to the parameters, through the interval bounds too. Neither these bounds nor
    ``margins.margin_bounds`` are the tighter ones for every network; the elementwise maximum of
    both is sound.

    Args:
        network: a chain (nested Sequentials) from the box's shape to logits ``(batch, classes)``.
        interval: boxes ``(batch, ...)``, as of :meth:`Interval.around`.
        labels: the classes y, int64 ``(batch,)``.

    Returns:
        ``(batch, classes)`` with 0 in column y.

    Raises:
        UnsupportedLayer: a layer is no ReLU and has no rule of ``pullback.pull_back``.
        ValueError: the logits are not of shape ``(batch, classes)`` or the labels not ``(batch,)``.

    >>> box = Interval.around(torch.full((1, 2), 0.5), 0.25)
    >>> crown_ibp_margins(nn.Identity(), box, torch.tensor([0]))
    tensor([[ 0.0000, -0.5000]])
    """
    return crown_margins(tuple(layer_inputs(network, interval)), labels)


def crown_margins(trace: Trace, labels: Tensor) -> Tensor:
    """:func:`crown_ibp_margins` from boxes that are at hand already.

    A mixture with the interval margins costs one interval pass. The pass back, with its sums over
    all neurons, is taken without autocast.

    >>> network, box = nn.Sequential(nn.Identity()), Interval.around(torch.zeros(1, 2), 0.25)
    >>> trace, labels = tuple(layer_inputs(network, box)), torch.tensor([0])
    >>> from robust_app.margins import margins_after
    >>> 0.5 * margins_after(*trace[-1], labels) + 0.5 * crown_margins(trace, labels)
    tensor([[ 0.0000, -0.2500]])
    """
    boxes = [values for _, box in trace for values in (box.center, box.radius)]
    with without_autocast(*boxes) as values:
        intervals = map(Interval, values[::2], values[1::2])
        layers = (layer for layer, _ in trace)
        return _crown_margins(list(zip(layers, intervals, strict=True)), labels)


def _crown_margins(trace: Trace, labels: Tensor) -> Tensor:
    logits, batch = _logits(trace), len(trace[0][1].center)
    if logits.ndim != 2 or labels.shape != (batch,):
        raise ValueError(
            "expected logits of shape (batch, classes) and labels of shape (batch,),"
            f" got {(batch, *logits.shape[1:])} and {tuple(labels.shape)}"
        )
    classes = logits.shape[1]
    # Without the margin of the label to itself: a tenth less to compute for ten classes.
    others = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
    others = others + (others >= labels.unsqueeze(1))
    bound = margin_bound(logits, labels.unsqueeze(1), others)
    margins = lower_bounds(trace, bound)
    return margins.new_zeros(len(labels), classes).scatter(1, others, margins)


def margin_bound(example: Tensor, labels: Tensor, others: Tensor) -> LinearBound:
    """The margins z_y - z_j as linear functions of the logits.

    Args:
        example: logits or margins, of which type, device and classes count, ``(..., classes)``.
        labels: classes y, int64 ``(batch, spec)`` or broadcast to it.
        others: classes j, int64 ``(batch, spec)``.
    """
    one_hot = torch.eye(example.shape[-1], dtype=example.dtype, device=example.device)
    return LinearBound(one_hot[labels] - one_hot[others], example.new_zeros(others.shape))


# --- Stages ----------------------------------------------------------------------------------


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
        """What interval bounds know; the network is :func:`~.certificates.in_float64`."""
        trace = tuple(enclosures(network, box))
        errors = margin_errors(*trace[-1], labels)
        return cls(trace, labels, errors, computed_margins(*trace[-1], labels))

    @property
    def proved(self) -> Tensor:
        """Whether all margins of an image are above 0, bool ``(batch,)``."""
        return (self.margins > 0).all(1)

    def only(self, images: Tensor) -> "Problem":
        """The same for a choice of the images, by index or mask."""
        trace = [(layer, box.select(images)) for layer, box in self.trace]
        return Problem(trace, self.labels[images], self.errors[images], self.margins[images])


Stage = Callable[[Problem], Problem]


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
    margins = computed_margins(*trace[-1], problem.labels)
    return replace(problem, trace=trace, margins=torch.maximum(problem.margins, margins))


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


# --- Verifiers -------------------------------------------------------------------------------


@torch.no_grad()
@plain_float32()
def _proved(
    stages: Sequence[Stage], network: nn.Module, x: Tensor, labels: Tensor, epsilon: float
) -> Tensor:
    """Whether the stages, one after the other, prove an image: what all verifiers have in common.

    Images that are misclassified as they are, are left out.
    """
    x = as_network(x, network)
    check_images(x)
    logits = network(x)
    check_labels(labels, logits.shape)
    correct = (logits.argmax(1) == labels).nonzero().squeeze(1)
    proved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    exact = in_float64(network)
    # One image tells the sizes, and whether all layers have rules, however easy the images are.
    trace = tuple(enclosures(exact, ball(x[:1].double(), epsilon)))
    crown_margins(trace, labels[:1])

    for images in torch.split(correct, rows_at_once(trace)):
        problem = Problem.of(exact, ball(x[images].double(), epsilon), labels[images])
        proved[images] = problem.proved
        for stage in stages:
            images, problem = images[~problem.proved], problem.only(~problem.proved)
            if len(images) == 0:
                break
            problem = stage(problem)
            proved[images] = problem.proved
    return proved


def crown_ibp(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Linear relaxation on top of interval bounds: the cheapest.

    Args, returns and errors, of the verifiers below too, are those of
    :func:`robust_app.certificates.certified`; a layer without a rule of
    :func:`~robust_app.pullback.pull_back` is an ``UnsupportedLayer`` too.
    """
    return _proved((relax,), network, x, labels, epsilon)


def alpha_crown_ibp(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``crown_ibp``, then optimised slopes."""
    return _proved((relax, optimize), network, x, labels, epsilon)


def crown(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``crown_ibp``, then linear relaxation for the bounds of the hidden layers too."""
    return _proved((relax, tighten, relax), network, x, labels, epsilon)


def alpha_crown(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``alpha_crown_ibp``, then ``crown`` and its slopes optimised: the tightest."""
    return _proved((relax, optimize, tighten, relax, optimize), network, x, labels, epsilon)


def _logits(trace: Trace) -> Tensor:
    """Of the centre of the first image's box before the last layer, ``(1, classes)``."""
    last, hidden = trace[-1]
    with torch.no_grad():
        logits: Tensor = last(hidden.center[:1].clone())
    return logits
