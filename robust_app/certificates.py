"""Certificates that hold for a network as it is evaluated, in float32.

Interval bounds of real numbers say nothing about a network of rounded ones. Here the box at each
layer holds what the layers before it *compute*, for every float32 image of the ball: it is widened
by what float32 may round (:mod:`robust_app.rounding`), and so that its own rounding does no harm.
Boxes may be float64, for a network :func:`~robust_app.plain_networks.in_float64`, or float32:
faster and a little wider.
"""

from collections.abc import Iterable, Iterator
from numbers import Real

import torch
from torch import Tensor, nn

from robust_app.bounds import propagate
from robust_app.interval import Computed, Interval, check_images
from robust_app.layer_rules import by_rule, is_plainly
from robust_app.layers import Residual
from robust_app.margins import layer_inputs, margin_bounds, margins_after
from robust_app.plain_networks import as_network, in_float64
from robust_app.precision import plain_float32
from robust_app.rounding import rounded, rounding_error

ENDS = 2.0**-22
"""More than float32 rounds where an attack computes the ends of pixels, in pixels of [0, 1]."""

OWN = 4.0
"""How many units of the last place the ends of a box may be rounded by, at most, in a layer."""

SPARE = {torch.float64: 2.0**-50, torch.float32: 2.0**-21}
"""More than the ends of pixels are rounded by here, by the type that they are computed in."""


def ball(x: Tensor, epsilon: float) -> Interval:
    """The float32 images that an attack may take for those within ε of x.

    Args:
        x: images in [0, 1], float32 or float64 as the box is to be, ``(batch, ...)``.
        epsilon: radius >= 0 in pixels of [0, 1].

    Raises:
        TypeError: ``epsilon`` is no number.
        ValueError: ``epsilon`` is below 0 or NaN, or x is not in [0, 1].
    """
    if not isinstance(epsilon, Real) or isinstance(epsilon, bool):
        raise TypeError(f"epsilon must be a number, got {epsilon!r}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    epsilon = float(epsilon)  # numpy's would round the sum to their type
    check_images(x)  # of others, the ball within [0, 1] says nothing, or is empty
    box = Interval.around(x, epsilon + ENDS)
    return Interval(box.center, box.radius + SPARE[x.dtype])


def enclose(layer: nn.Module, box: Interval) -> Computed:
    """A box of what ``layer`` computes in float32 for float32 inputs in the given box.

    Args:
        layer: with the box's type of numbers, in evaluation mode.
        box: ``(batch, ...)``.

    Raises:
        UnsupportedLayer: it has no rule of ``propagate`` or ``rounding_error``.

    >>> box = Interval.around(torch.ones(1, 1, dtype=torch.float64), 0.5)  # within [0, 1]
    >>> layer = nn.Linear(1, 1, dtype=torch.float64)
    >>> bool(enclose(layer, box).upper > propagate(layer, box).upper)
    True
    """
    if is_plainly(layer, nn.Sequential):
        for part in layer:
            box = enclose(part, box)
        return _of_layers(box)
    if is_plainly(layer, Residual):
        body, shortcut = enclose(layer.body, box), enclose(layer.shortcut, box)
        total = Interval(body.center + shortcut.center, body.radius + shortcut.radius)
        return _of_layers(_computed(total, rounded(1, body.magnitude + shortcut.magnitude)))
    computed = _computed(by_rule(propagate, layer, box), by_rule(rounding_error, layer, box))
    # What may be infinite or no number may come out of a layer as anything, also within its range.
    finite = (box.center.isfinite() & box.radius.isfinite()).flatten(1).all(1)
    if not bool(finite.all()):
        computed.radius[~finite] = torch.nan
    return computed


def _of_layers(box: Interval) -> Computed:
    """Of a layer made of layers, which round one after the other.

    What it computes and what it is in real numbers are both in the box: no more is known, and
    linear relaxation gains nothing by going back through it.
    """
    return Computed(box.center, box.radius, 2 * box.radius)


def _computed(box: Interval, error: Tensor | None) -> Computed:
    radius = box.radius if error is None else box.radius + error
    own = OWN * torch.finfo(radius.dtype).eps * (box.center.abs() + radius)
    return Computed(box.center, radius + own, error)


def enclosures(network: nn.Module, box: Interval) -> Iterator[tuple[nn.Module, Interval]]:
    """:func:`~robust_app.margins.layer_inputs` with boxes of computed values."""
    return layer_inputs(network, box, enclose)


def computed_margins(last: nn.Module, hidden: Interval, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bounds of the computed margins z_y - z_j from the box at the last layer.

    Args:
        last: the last layer.
        hidden: of computed values.
        labels: the classes y, int64 ``(batch,)``.

    Returns:
        ``(batch, classes)`` with inf in column y; and what the rounding of the last layer may take
        from the margins, of the same shape.

    Raises:
        ValueError: the labels are of another type or shape, or no classes of the network.
    """
    logits = enclose(last, hidden)
    check_labels(labels, logits.center.shape)
    rounding = torch.zeros_like(logits.radius) if logits.error is None else logits.error
    errors = rounding.gather(1, labels.unsqueeze(1)) + rounding
    if is_plainly(last, nn.Linear):  # merged with the margins, as for training
        margins = margins_after(last, hidden, labels) - errors
    else:
        margins = margins_after(nn.Identity(), logits, labels)
    return _of_others(margins, labels), errors


def check_labels(labels: Tensor, logits: torch.Size) -> None:
    """See that labels are classes of a network.

    Args:
        labels: of a batch.
        logits: their shape.

    Raises:
        TypeError: the labels are no tensor.
        ValueError: the labels are of another type or shape, or no classes of the network; or the
            logits are not ``(batch, classes)``.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor of classes, found {labels!r}")
    if len(logits) != 2:
        raise ValueError(f"expected logits of shape (batch, classes), got {tuple(logits)}")
    images, classes = logits
    if labels.dtype != torch.int64 or labels.shape != (images,):
        raise ValueError(
            f"labels: expected torch.int64 of shape ({images},), "
            f"found {labels.dtype} of {tuple(labels.shape)}"
            + " (a single one is labels[None])"
            * (labels.ndim == 0)
        )
    if not bool(((labels >= 0) & (labels < classes)).all()):
        found = f"from {labels.min().item()} to {labels.max().item()}"
        raise ValueError(f"labels: expected classes from 0 to {classes - 1}, found {found}")


def _of_others(margins: Tensor, labels: Tensor) -> Tensor:
    return margins.scatter(1, labels.unsqueeze(1), torch.inf)


@torch.no_grad()
@plain_float32()
def certified(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Whether interval bounds prove that no perturbation within ε changes the class.

    A theorem about the network as it is evaluated in float32, for every float32 image of the ball,
    see :mod:`robust_app.rounding` for what that supposes.

    Args:
        network: see :func:`robust_app.margins.margin_bounds`; in evaluation mode.
        x: images in [0, 1], ``(batch, ...)``.
        labels: the true classes, int64 ``(batch,)``.
        epsilon: l_inf radius >= 0 in pixels of [0, 1].

    Returns:
        Booleans ``(batch,)``: all margins over the other classes are above 0.

    Raises:
        UnsupportedLayer, ValueError: see :func:`enclose`, :func:`ball`, :func:`computed_margins`
            and :func:`robust_app.margins.margin_bounds`.
        UserError: see :func:`~robust_app.plain_networks.in_float64`.

    >>> certified(nn.Identity(), torch.tensor([[0.8, 0.4]]), torch.tensor([0]), 0.1)
    tensor([True])
    """
    x, exact = as_network(x, network), in_float64(network)
    if x.dtype == torch.float64:
        return _proved(enclosures(exact, ball(x, epsilon)), labels)
    proved = _proved(enclosures(network, ball(x, epsilon)), labels)
    # What float32 bounds do not prove with the rounding, but would without, is near: float64 tells.
    near = (~proved).nonzero().squeeze(1)
    if len(near) > 0:
        plain = margin_bounds(network, Interval.around(x[near], epsilon), labels[near])
        near = near[(_of_others(plain, labels[near]) > 0).all(1)]
    if len(near) > 0:
        box = ball(x[near].double(), epsilon)
        proved[near] = _proved(enclosures(exact, box), labels[near])
    return proved


def _proved(trace: Iterable[tuple[nn.Module, Interval]], labels: Tensor) -> Tensor:
    *_, (last, hidden) = trace
    margins, _ = computed_margins(last, hidden, labels)
    return (margins > 0).all(1)
