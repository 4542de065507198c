"""How far what a layer computes in float32 may be from what it is in real numbers.

A float32 operation errs by at most u = 2⁻²⁴ of its result, unless that underflows, which costs at
most the smallest normal number more. A sum of n terms, in whatever order and with or without fused
operations, therefore errs by at most γₙ = nu / (1 - nu) of the largest size that a partial sum can
have (after Higham, "Accuracy and Stability of Numerical Algorithms", sections 3.1 and 4.2). Terms
that are 0, and so the inputs that a ReLU has switched off, are not rounded and do not count.

Nobody promises as much for Winograd's or Fourier convolutions, which cuDNN may choose, or for TF32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_app.batch_norm import BatchNorm
from robust_app.interval import Interval
from robust_app.layer_rules import DROPOUTS, Rules
from robust_app.layers import ElementwiseAffine, Normalize

UNITS: Mapping[torch.dtype, float] = {
    torch.float64: 2.0**-24 * (1 + 2.0**-10),
    torch.float32: 2.0**-20,
}
"""The u of all bounds, by the type that these are computed in: they are rounded themselves.

Float64 rounds, in as many operations, 2²⁹ times less than float32: the 2⁻¹⁰ pays for it. Bounds in
float32 take 16 u: one for the network; one for the centre and two for the radius of a box, whose
terms are no more than the network's; the others to spare.
"""

UNDERFLOW = 2.0**-125
"""Twice the smallest normal float32: what an operation may lose where its result is below that."""

OVERFLOW = 2.0**127
"""Half of what float32 cannot hold: sums of absolute values from here on may be infinite."""

ROUNDINGS_OF_FUNCTIONS = 16
"""How many roundings of 1 + \\|x\\| torch's smooth activations are taken to need.

No theorem: exp, log1p and tanh are documented to within 4 units by the libraries that torch calls.
"""


def rounded(roundings: int | Tensor, sizes: Tensor) -> Tensor:
    """What so many roundings in a row, of numbers of these sizes, may add up to.

    Args:
        roundings: n of γₙ.
        sizes: what is rounded is at most this large, in float64 or float32.

    Returns:
        Of the shape and type of ``sizes``; inf where float32 may overflow, or nu is a quarter.

    >>> rounded(3, torch.ones(1, dtype=torch.float64)) / (3 * 2**-24)
    tensor([1.0010], dtype=torch.float64)
    """
    units = torch.as_tensor(roundings, device=sizes.device) * UNITS[sizes.dtype]
    factor = torch.where(units < 0.25, units / (1 - units), torch.inf)
    error = sizes * factor.to(sizes)
    error += roundings * UNDERFLOW
    if not bool((sizes < OVERFLOW).all()):
        error = torch.where(sizes < OVERFLOW, error, torch.inf)
    return error


@singledispatch
def rounding_error(layer: nn.Module, box: Interval) -> Tensor | None:
    """A bound of \\|computed layer(x) - layer(x)\\| for every float32 x in a box.

    There are rules for all layers that :func:`robust_app.bounds.propagate` has rules for, but for
    those made of layers. A rule for a layer of your own is registered on its type; for one that
    rounds once:

    >>> class Third(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x / 3
    >>> @rounding_error.register
    ... def third(layer: Third, box: Interval) -> Tensor:
    ...     return rounded(1, box.magnitude / 3)
    >>> rounding_error(Third(), Interval(torch.zeros(1), torch.ones(1))) < 4e-7
    tensor([True])

    Args:
        layer: with the box's type of numbers, in evaluation mode;
            see :func:`~robust_app.plain_networks.in_float64`.
        box: of the layer's inputs, ``(batch, ...)``.

    Returns:
        Of the shape of its outputs, or None where nothing is rounded.

    Raises:
        UnsupportedLayer: there is no rule for this type of layer, or it grows exponentially: a
            CELU with an alpha below 0, a Softplus with a threshold above 80.
    """
    del box
    raise _RULES.unsupported(layer)


_RULES = Rules(rounding_error, "rounding error")


@_RULES.of(nn.Linear)
def _linear(layer: nn.Linear, box: Interval) -> Tensor:
    return _sums_of_products(layer, box, F.linear, _sources(box).sum(-1, keepdim=True))


@_RULES.of(nn.Conv2d)
def _conv2d(layer: nn.Conv2d, box: Interval) -> Tensor:
    batch, channels, *size = box.center.shape
    in_groups = _sources(box).view(batch, layer.groups, channels // layer.groups, *size)
    ones = torch.ones_like(layer.weight[: layer.groups, :1])
    counts = layer._conv_forward(in_groups.sum(2), ones, None)
    if layer.groups > 1:  # a single one is broadcast
        counts = counts.repeat_interleave(layer.out_channels // layer.groups, dim=1)
    return _sums_of_products(layer, box, layer._conv_forward, counts)


def _sources(box: Interval) -> Tensor:
    """1 for each input that may be other than 0."""
    return (box.magnitude > 0).to(box.center)


def _sums_of_products(
    layer: nn.Linear | nn.Conv2d,
    box: Interval,
    products: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    terms: Tensor,
) -> Tensor:
    """The error of sums of so many products and a bias.

    A partial sum lies between the sum of the negative terms and that of the positive ones, whose
    sizes are half the sum and half the difference of two numbers: the largest that all terms can
    add up to by size, and what they add up to where each input is as large as it can be.
    """
    center, radius = box.center, box.radius
    # Of inputs between -n and p, p and n at least 0: p + n, and p - n.
    sizes = torch.maximum(center.abs(), radius).add_(radius)
    balance = center.clamp(-radius, radius).add_(center)
    bias = None if layer.bias is None else layer.bias.abs()
    partial = products(sizes, layer.weight.abs(), bias)
    partial += products(balance, layer.weight, layer.bias).abs_()
    partial *= 0.5
    # Besides the sums each product is rounded, which is no more than two of them, and one pays
    # for the second order.
    return rounded(terms + 3, partial)


@_RULES.of(nn.AvgPool2d)
def _average(layer: nn.AvgPool2d, box: Interval) -> Tensor:
    height, width = _pair(layer.kernel_size)
    return _mean(layer, box, height * width, layer.divisor_override or height * width)


@_RULES.of(nn.AdaptiveAvgPool2d)
def _adaptive_average(layer: nn.AdaptiveAvgPool2d, box: Interval) -> Tensor:
    pixels = box.center.shape[-2] * box.center.shape[-1]
    return _mean(layer, box, pixels, pixels)


def _mean(layer: nn.Module, box: Interval, pixels: int, divisor: int) -> Tensor:
    """Of a sum of so many pixels at most, over so much at most; dividing it may underflow too."""
    return rounded(pixels + 1, layer(box.magnitude) * divisor) / divisor + UNDERFLOW


@_RULES.of(Normalize)
def _normalize(layer: Normalize, box: Interval) -> Tensor:
    difference = box.magnitude + layer.mean.abs()
    error = rounded(2, difference / layer.std.abs())
    return torch.where(difference < OVERFLOW, error, torch.inf)


@_RULES.of(ElementwiseAffine)
def _elementwise(layer: ElementwiseAffine, box: Interval) -> Tensor:
    return rounded(2, layer.scale.abs() * box.magnitude + layer.shift.abs())


@_RULES.of(BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(layer: Any, box: Interval) -> Tensor:
    variance = layer.running_var + layer.eps
    scale, bias = torch.rsqrt(variance), torch.zeros_like(variance)
    if layer.weight is not None:
        scale = scale * layer.weight.abs()
    if layer.bias is not None:
        bias = layer.bias.abs()
    in_range = (variance < OVERFLOW) & (scale < OVERFLOW)
    per_channel = (-1, *[1] * (box.center.ndim - 2))
    scale, bias, in_range = (values.view(per_channel) for values in (scale, bias, in_range))
    inputs = box.magnitude + layer.running_mean.abs().view(per_channel)
    # A sum, a reciprocal square root to 2 units, a product; then the shift's and the result's.
    error = rounded(9, scale * inputs + bias)
    # The scale may underflow or overflow although what comes of it does not.
    return torch.where(in_range, error + inputs * UNDERFLOW, torch.inf)


@_RULES.of(
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardshrink,
    nn.Threshold,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    *DROPOUTS,
)
def _choice(layer: nn.Module, box: Interval) -> None:
    """Of layers that choose among inputs and constants."""
    del layer, box


def _smooth(scale: Callable[[Any], Any]) -> Callable[[nn.Module, Interval], Tensor]:
    """The rule of an activation with \\|f(x)\\| and \\|x f'(x)\\| <= scale + \\|x\\|."""

    def rule(layer: nn.Module, box: Interval) -> Tensor:
        return rounded(ROUNDINGS_OF_FUNCTIONS, scale(layer) + box.magnitude)

    return rule


_RULES.of(nn.LogSigmoid, nn.Sigmoid, nn.Softsign, nn.Tanh, nn.Tanhshrink)(_smooth(lambda _: 1.0))
_RULES.of(nn.Hardsigmoid)(_smooth(lambda _: 3.0))
_RULES.of(nn.SELU)(_smooth(lambda _: 2.0))
_RULES.of(nn.ELU)(_smooth(lambda layer: 1 + abs(layer.alpha)))
_RULES.of(nn.Softshrink)(_smooth(lambda layer: layer.lambd))


@_RULES.of(nn.Softplus)
def _softplus(layer: nn.Softplus, box: Interval) -> Tensor:
    if not 0 < abs(layer.beta) < math.inf:
        raise _RULES.unsupported(layer, "its beta is 0 or not finite")
    if layer.threshold > 80:
        raise _RULES.unsupported(layer, "up to a threshold above 80 it may overflow")
    return rounded(ROUNDINGS_OF_FUNCTIONS, 1 / abs(layer.beta) + box.magnitude)


@_RULES.of(nn.CELU)
def _celu(layer: nn.CELU, box: Interval) -> Tensor:
    if layer.alpha < 0:  # exp(x/α) then has no bound
        raise _RULES.unsupported(layer, "its alpha is below 0")
    return rounded(ROUNDINGS_OF_FUNCTIONS, 1 + layer.alpha + box.magnitude)


@_RULES.of(nn.LeakyReLU)
def _leaky(layer: nn.LeakyReLU, box: Interval) -> Tensor:
    return rounded(1, abs(layer.negative_slope) * box.magnitude)


@_RULES.of(nn.PReLU)
def _prelu(layer: nn.PReLU, box: Interval) -> Tensor:
    return rounded(1, layer.weight.abs().max() * box.magnitude)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, as torch takes them: one number, alone or in a list, is both."""
    sides = [size] if isinstance(size, int) else size
    return sides[0], sides[-1]
