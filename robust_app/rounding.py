"""How far what a layer computes in float32 may be from what it is in real numbers.

A float32 operation errs by at most u = 2⁻²⁴ of its result, and a sum of n products, in whatever
order and with or without fused operations, by at most γₙ = nu / (1 - nu) of the sum of their
absolute values (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1), as long as
nothing underflows, which costs at most the smallest normal number more for each operation. Nobody
promises as much for Winograd's or Fourier convolutions, which cuDNN may choose, nor for TF32.

:data:`UNIT` is twice u. The half that float32 does not need is 2²⁹ times what float64, in which all
bounds of this module are computed and used, rounds in as many operations: it pays for that.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from robust_app.batch_norm import BatchNorm
from robust_app.layer_rules import Rules
from robust_app.layers import ElementwiseAffine, Normalize

UNIT = 2.0**-23
"""Twice the unit roundoff u of float32."""

UNDERFLOW = 2.0**-125
"""Twice the smallest normal float32: what an operation may lose where its result is below that."""

OVERFLOW = 2.0**127
"""Half of what float32 cannot hold: sums of absolute values from here on may be infinite."""

ROUNDINGS_OF_FUNCTIONS = 16
"""How many roundings of 1 + \\|x\\| torch's smooth activations are taken to need.

No theorem: exp, log1p and tanh are documented to within 4 units by the libraries that torch calls.
"""


def gamma(operations: int) -> float:
    """γₙ for as many operations, of :data:`UNIT`.

    Raises:
        ValueError: there are 2²² or more: then the bound says nothing.

    >>> gamma(1) / UNIT
    1.0000001192092896
    """
    if operations * UNIT >= 0.5:
        raise ValueError(f"operations: expected fewer than {0.5 / UNIT:.0f}, found {operations}")
    return operations * UNIT / (1 - operations * UNIT)


@singledispatch
def rounding_error(layer: nn.Module, magnitude: Tensor) -> Tensor | None:
    """A bound of \\|computed layer(x) - layer(x)\\| for float32 x with \\|x\\| <= magnitude.

    There are rules for all layers that :func:`robust_app.bounds.propagate` has rules for, but for
    those made of layers. A rule for a layer of your own is registered on its type; for one that
    rounds once:

    >>> class Double(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return 2 * x
    >>> @rounding_error.register
    ... def double(layer: Double, magnitude: Tensor) -> Tensor:
    ...     return gamma(1) * 2 * magnitude + UNDERFLOW
    >>> rounding_error(Double(), torch.tensor([1.0], dtype=torch.float64)) < 3e-7
    tensor([True])

    Args:
        layer: of a network :func:`~robust_app.certificates.in_float64`, in evaluation mode.
        magnitude: float64, of the layer's inputs, ``(batch, ...)``.

    Returns:
        Float64 of the shape of its outputs, or None where nothing is rounded.

    Raises:
        UnsupportedLayer: there is no rule for this type of layer.
    """
    del magnitude
    raise _RULES.unsupported(layer)


_RULES = Rules(rounding_error, "rounding error")


def _rounded(operations: int, sums: Tensor) -> Tensor:
    """The error of so many operations in a row, on absolute values with these sums."""
    error = gamma(operations) * sums + operations * UNDERFLOW
    return torch.where(sums < OVERFLOW, error, torch.inf)


@_RULES.of(nn.Linear)
def _linear(layer: nn.Linear, magnitude: Tensor) -> Tensor:
    sums = nn.functional.linear(magnitude, layer.weight.abs(), _absolute(layer.bias))
    return _sum_of_products(layer.in_features, sums)


@_RULES.of(nn.Conv2d)
def _conv2d(layer: nn.Conv2d, magnitude: Tensor) -> Tensor:
    sums = layer._conv_forward(magnitude, layer.weight.abs(), _absolute(layer.bias))
    return _sum_of_products(layer.weight[0].numel(), sums)


def _sum_of_products(products: int, sums: Tensor) -> Tensor:
    # A product and the sums with the others and the bias: products + 1 roundings of each term.
    return _rounded(products + 1, sums) + products * UNDERFLOW


def _absolute(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.abs()


@_RULES.of(nn.AvgPool2d, nn.AdaptiveAvgPool2d)
def _average(layer: nn.Module, magnitude: Tensor) -> Tensor:
    pixels = magnitude.shape[-2] * magnitude.shape[-1]  # at most
    return _rounded(pixels + 1, layer(magnitude) * pixels) / pixels


@_RULES.of(Normalize)
def _normalize(layer: Normalize, magnitude: Tensor) -> Tensor:
    return _rounded(2, (magnitude + layer.mean.abs()) / layer.std)


@_RULES.of(ElementwiseAffine)
def _elementwise(layer: ElementwiseAffine, magnitude: Tensor) -> Tensor:
    return _rounded(2, layer.scale.abs() * magnitude + layer.shift.abs())


@_RULES.of(BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(layer: Any, magnitude: Tensor) -> Tensor:
    scale = torch.rsqrt(layer.running_var + layer.eps)
    shift = layer.running_mean.abs() * scale
    if layer.weight is not None:
        scale, shift = scale * layer.weight.abs(), shift * layer.weight.abs() + layer.bias.abs()
    per_channel = (-1, *[1] * (magnitude.ndim - 2))
    # A sum, a reciprocal square root to 2 units, a product; then the shift's and the result's.
    return _rounded(9, scale.view(per_channel) * magnitude + shift.view(per_channel))


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
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
def _choice(layer: nn.Module, magnitude: Tensor) -> None:
    """Of layers that choose among inputs and constants."""
    del layer, magnitude


def _smooth(scale: Callable[[Any], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The rule of an activation with \\|f(x)\\| and \\|x f'(x)\\| <= scale + \\|x\\|."""

    def rule(layer: nn.Module, magnitude: Tensor) -> Tensor:
        return _rounded(ROUNDINGS_OF_FUNCTIONS, scale(layer) + magnitude)

    return rule


_RULES.of(nn.LogSigmoid, nn.Sigmoid, nn.Softsign, nn.Tanh, nn.Tanhshrink)(_smooth(lambda _: 1.0))
_RULES.of(nn.Hardsigmoid)(_smooth(lambda _: 3.0))
_RULES.of(nn.SELU)(_smooth(lambda _: 2.0))
_RULES.of(nn.CELU, nn.ELU)(_smooth(lambda layer: 1 + abs(layer.alpha)))
_RULES.of(nn.Softplus)(_smooth(lambda layer: 1 + 1 / layer.beta))
_RULES.of(nn.Softshrink)(_smooth(lambda layer: layer.lambd))


@_RULES.of(nn.LeakyReLU)
def _leaky(layer: nn.LeakyReLU, magnitude: Tensor) -> Tensor:
    return _rounded(1, abs(layer.negative_slope) * magnitude)


@_RULES.of(nn.PReLU)
def _prelu(layer: nn.PReLU, magnitude: Tensor) -> Tensor:
    return _rounded(1, layer.weight.abs().max() * magnitude)
