"""Interval bound propagation (paper, section 2): boxes through layers.

A box is kept as centre and radius, so that an affine layer with weight W costs two products,
one with W for the centre and one with |W| for the radius; only nonlinear layers ask for the
lower and upper bounds. Bounds hold up to the rounding of floating-point arithmetic.
"""

from collections.abc import Callable, Iterable
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_app.batch_norm import BatchNorm
from robust_app.fused import relu_box
from robust_app.interval import Interval
from robust_app.layer_rules import DROPOUTS, IN_TRAINING, Rules
from robust_app.layers import ElementwiseAffine, Normalize, Residual
from robust_app.precision import InFloat32, without_autocast


@singledispatch
def propagate(layer: nn.Module, interval: Interval) -> Interval:
    """A box that holds ``layer(x)`` for every x of the given box.

    There are rules for Linear, Conv2d, the non-decreasing activations, pooling, torch's BatchNorm
    and Dropout in evaluation, Flatten, Unflatten, Identity, Sequential, Normalize, Residual,
    ElementwiseAffine and :class:`robust_app.batch_norm.BatchNorm`.
    A rule for a layer of your own is registered on its type:

    >>> class Double(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return 2 * x
    >>> @propagate.register
    ... def double(layer: Double, interval: Interval) -> Interval:
    ...     return Interval(2 * interval.center, 2 * interval.radius)
    >>> propagate(Double(), Interval(torch.tensor([1.0]), torch.tensor([0.5])))
    Interval(center=tensor([2.]), radius=tensor([1.]))

    Raises:
        UnsupportedLayer: there is no rule for this type of layer, or the layer is in a state
            (training mode, a decreasing activation) in which its rule would not be sound.
    """
    del interval
    raise _RULES.unsupported(layer)


_RULES = Rules(propagate, "bounds")


@_RULES.of(nn.Sequential)
def _through(layers: Iterable[nn.Module], interval: Interval) -> Interval:
    for layer in layers:
        interval = propagate(layer, interval)
    return interval


@_RULES.of(Residual)
def _residual(layer: Residual, interval: Interval) -> Interval:
    body = propagate(layer.body, interval)
    shortcut = propagate(layer.shortcut, interval)
    return Interval(body.center + shortcut.center, body.radius + shortcut.radius)


@_RULES.of(nn.Linear)
def _linear(layer: nn.Linear, interval: Interval) -> Interval:
    return Interval(layer(interval.center), F.linear(interval.radius, layer.weight.abs()))


@_RULES.of(nn.Conv2d)
def _conv2d(layer: nn.Conv2d, interval: Interval) -> Interval:
    center = layer(interval.center)
    # The layer's own method pads the radius as forward pads x. Copies of a pixel then count as
    # pixels of their own: sound, and loose only where a kernel sees the pixel twice.
    radius = layer._conv_forward(interval.radius, layer.weight.abs(), None)
    return Interval(center, radius)


@_RULES.of(InFloat32)
def _in_float32(layer: InFloat32, interval: Interval) -> Interval:
    with without_autocast(interval.center, interval.radius) as (center, radius):
        return propagate(layer.layer, Interval(center, radius))


@_RULES.of(Normalize)
def _normalize(layer: Normalize, interval: Interval) -> Interval:
    return Interval(layer(interval.center), interval.radius / layer.std.abs())


@_RULES.of(ElementwiseAffine)
def _elementwise(layer: ElementwiseAffine, interval: Interval) -> Interval:
    return Interval(layer(interval.center), interval.radius * layer.scale.abs())


@_RULES.of(BatchNorm)
def _clean_batch_norm(layer: BatchNorm, interval: Interval) -> Interval:
    if not layer.has_statistics:
        raise _RULES.unsupported(layer, "it has no statistics; enter batch_norm.clean_statistics")
    scale, _ = layer.scale_and_shift()
    return Interval(layer(interval.center), interval.radius * _per_channel(scale.abs(), interval))


@_RULES.of(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, interval: Interval) -> Interval:
    if layer.training:
        raise _RULES.unsupported(layer, IN_TRAINING)
    if layer.running_var is None:
        raise _RULES.unsupported(layer, "it has no running statistics")
    scale = torch.rsqrt(layer.running_var + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight.abs()
    return Interval(layer(interval.center), interval.radius * _per_channel(scale, interval))


def _per_channel(values: Tensor, interval: Interval) -> Tensor:
    return values.view(-1, *[1] * (interval.radius.ndim - 2))


@_RULES.of(nn.Identity, nn.AdaptiveAvgPool2d)
def _averaging(layer: nn.Module, interval: Interval) -> Interval:
    """A layer whose outputs are averages of inputs, of a single one perhaps."""
    return Interval(layer(interval.center), layer(interval.radius))


@_RULES.of(nn.Flatten)
def _flatten(layer: nn.Flatten, interval: Interval) -> Interval:
    return _reshaping(layer, layer.start_dim, interval)


@_RULES.of(nn.Unflatten)
def _unflatten(layer: nn.Unflatten, interval: Interval) -> Interval:
    return _reshaping(layer, layer.dim, interval)


def _reshaping(layer: nn.Module, first: int, interval: Interval) -> Interval:
    if first in (0, -interval.center.ndim):
        raise _RULES.unsupported(layer, f"{layer} does not keep the images of a batch apart")
    return _averaging(layer, interval)


@_RULES.of(nn.AvgPool2d)
def _avg_pool2d(layer: nn.AvgPool2d, interval: Interval) -> Interval:
    if layer.divisor_override is not None and layer.divisor_override < 0:
        raise _RULES.unsupported(layer, "its divisor_override is below 0")
    return _averaging(layer, interval)


@_RULES.of(*DROPOUTS)
def _dropout(layer: nn.Module, interval: Interval) -> Interval:
    if layer.training:
        raise _RULES.unsupported(layer, IN_TRAINING)
    return interval


@_RULES.of(
    nn.CELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.LogSigmoid,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
def _non_decreasing(layer: nn.Module, interval: Interval) -> Interval:
    return Interval.between(layer(interval.lower), layer(interval.upper))


@_RULES.of(nn.ReLU)
def _relu(layer: nn.ReLU, interval: Interval) -> Interval:
    del layer
    return Interval(*relu_box(interval.center, interval.radius))


@_RULES.of(nn.MaxPool2d, nn.AdaptiveMaxPool2d)
def _max_pool2d(layer: nn.MaxPool2d | nn.AdaptiveMaxPool2d, interval: Interval) -> Interval:
    if layer.return_indices:
        raise _RULES.unsupported(layer, "it returns indices beside its values")
    return _non_decreasing(layer, interval)


# Activations that are non-decreasing for some values of their parameters: for these.
_NON_DECREASING_IF: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.ELU: lambda elu: elu.alpha >= 0,
    nn.LeakyReLU: lambda leaky: leaky.negative_slope >= 0,
    nn.PReLU: lambda prelu: bool((prelu.weight >= 0).all()),
    # Where it turns linear it drops by log(1 + exp(-threshold)): nothing at the default 20.
    nn.Softplus: lambda softplus: softplus.threshold >= 20,
    nn.Threshold: lambda threshold: threshold.value <= threshold.threshold,
}


def _non_decreasing_if(
    condition: Callable[[Any], bool], layer: nn.Module, interval: Interval
) -> Interval:
    if not condition(layer):
        raise _RULES.unsupported(layer, f"{layer} decreases somewhere")
    return _non_decreasing(layer, interval)


for _kind, _condition in _NON_DECREASING_IF.items():
    _RULES.of(_kind)(partial(_non_decreasing_if, _condition))
