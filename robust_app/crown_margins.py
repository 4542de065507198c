"""CROWN-IBP's lower bounds of the margins (Zhang et al. 2020): what training differentiates."""

import torch
from torch import Tensor, nn

from robust_app.interval import Interval
from robust_app.margins import layer_inputs
from robust_app.precision import without_autocast
from robust_app.pullback import LinearBound
from robust_app.relaxation import Trace, lower_bounds


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


def _logits(trace: Trace) -> Tensor:
    """Of the centre of the first image's box before the last layer, ``(1, classes)``."""
    last, hidden = trace[-1]
    with torch.no_grad():
        logits: Tensor = last(hidden.center[:1].clone())
    return logits
