"""Linear functions of an affine layer's outputs as functions of its inputs: transposed layers."""

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_app import small_patches
from robust_app.batch_norm import BatchNorm
from robust_app.layer_rules import DROPOUTS, IN_TRAINING, Rules
from robust_app.layers import ElementwiseAffine, Normalize, applied
from robust_app.precision import InFloat32


@dataclass(frozen=True)
class LinearBound:
    """Lower bounds ``<coefficients, z> + constant`` that are linear in a layer's values z.

    ``coefficients`` have shape ``(batch, spec, *shape of z)``, ``constant`` ``(batch, spec)``.
    """

    coefficients: Tensor
    constant: Tensor


@singledispatch
def pull_back(layer: nn.Module, bound: LinearBound, shape: torch.Size) -> LinearBound:
    """Bounds in an affine layer's inputs from bounds in its outputs: the same functions.

    There are rules for Linear, Conv2d, average pooling, BatchNorm (with statistics of its own) and
    Dropout in evaluation, Flatten, Unflatten, Identity, Normalize and ElementwiseAffine. For an
    affine layer of your own, ``pull_back.register(MyLayer)(pull_back_affine)``.

    Args:
        layer: from ``(batch, *shape)``.
        bound: in its outputs.
        shape: of one of its inputs.

    Raises:
        UnsupportedLayer: there is no rule for this type of layer, or it is in training mode.
    """
    del bound, shape
    raise _RULES.unsupported(layer, "linear relaxation takes chains of affine layers and ReLU")


def pull_back_affine(layer: nn.Module, bound: LinearBound, shape: torch.Size) -> LinearBound:
    """:func:`pull_back` for any affine layer: by its vector-Jacobian product.

    >>> bound = LinearBound(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1))
    >>> pull_back_affine(nn.AvgPool2d(2), bound, torch.Size([1, 2, 2])).coefficients.tolist()
    [[[[[0.25, 0.25], [0.25, 0.25]]]]]
    """
    leading, coefficients = bound.constant.shape, bound.coefficients.flatten(0, 1)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        origin = coefficients.new_zeros(len(coefficients), *shape).requires_grad_()
        at_origin = applied(layer, origin)
        (pulled,) = torch.autograd.grad(
            at_origin, origin, coefficients, create_graph=differentiable
        )
    constant = inner_products(coefficients.unsqueeze(1), at_origin).view(leading)
    if not differentiable:
        constant = constant.detach()
    return LinearBound(pulled.view(*leading, *shape), bound.constant + constant)


def inner_products(coefficients: Tensor, values: Tensor) -> Tensor:
    """Inner products ``(batch, spec)`` of ``(batch, spec, *shape)`` and ``(batch, *shape)``."""
    return (coefficients.flatten(2) @ values.flatten(1).unsqueeze(2)).squeeze(2)


# --- The rules -------------------------------------------------------------------------------

_RULES = Rules(pull_back, "linear bounds")

_RULES.of(nn.AvgPool2d, nn.AdaptiveAvgPool2d, ElementwiseAffine)(pull_back_affine)


@_RULES.of(nn.Linear)
def _linear(layer: nn.Linear, bound: LinearBound, shape: torch.Size) -> LinearBound:
    del shape
    constant = bound.constant
    if layer.bias is not None:
        constant = constant + (bound.coefficients @ layer.bias).unsqueeze(2).flatten(2).sum(2)
    return LinearBound(bound.coefficients @ layer.weight, constant)


@_RULES.of(nn.Conv2d)
def _conv2d(layer: nn.Conv2d, bound: LinearBound, shape: torch.Size) -> LinearBound:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return pull_back_affine(layer, bound, shape)
    coefficients = bound.coefficients.flatten(0, 1)
    if small_patches.applies(layer, coefficients):
        geometry = small_patches.geometry_of(layer)
        pulled = small_patches.transposed(coefficients, layer.weight, shape[-2:], geometry)
    else:
        pulled = _transposed(layer, coefficients, shape[-2:])
    constant = bound.constant
    if layer.bias is not None:
        constant = constant + bound.coefficients.flatten(3).sum(3) @ layer.bias
    return LinearBound(pulled.view(*bound.constant.shape, *shape), constant)


def _transposed(layer: nn.Conv2d, coefficients: Tensor, size: torch.Size) -> Tensor:
    assert not isinstance(layer.padding, str)  # which goes another way
    reached = [
        (out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
        for out, stride, padding, dilation, kernel in zip(
            coefficients.shape[-2:],
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.kernel_size,
            strict=True,
        )
    ]
    return F.conv_transpose2d(
        coefficients,
        layer.weight,
        stride=layer.stride,
        padding=layer.padding,
        output_padding=[whole - end for whole, end in zip(size, reached, strict=True)],
        groups=layer.groups,
        dilation=layer.dilation,
    )


@_RULES.of(nn.Identity, nn.Flatten, nn.Unflatten)
def _reshape(layer: nn.Module, bound: LinearBound, shape: torch.Size) -> LinearBound:
    del layer
    return LinearBound(bound.coefficients.reshape(*bound.constant.shape, *shape), bound.constant)


@_RULES.of(*DROPOUTS)
def _dropout(layer: nn.Module, bound: LinearBound, shape: torch.Size) -> LinearBound:
    del shape
    if layer.training:
        raise _RULES.unsupported(layer, IN_TRAINING)
    return bound


@_RULES.of(InFloat32)
def _in_float32(layer: InFloat32, bound: LinearBound, shape: torch.Size) -> LinearBound:
    return pull_back(layer.layer, bound, shape)


@_RULES.of(Normalize)
def _normalize(layer: Normalize, bound: LinearBound, shape: torch.Size) -> LinearBound:
    del shape
    scale = 1 / layer.std.flatten()
    return _per_channel(bound, scale, -layer.mean.flatten() * scale)


@_RULES.of(BatchNorm)
def _clean_batch_norm(layer: BatchNorm, bound: LinearBound, shape: torch.Size) -> LinearBound:
    del shape
    if not layer.has_statistics:
        raise _RULES.unsupported(layer, "it has no statistics; enter batch_norm.clean_statistics")
    return _per_channel(bound, *layer.scale_and_shift())


@_RULES.of(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(
    layer: nn.BatchNorm1d | nn.BatchNorm2d, bound: LinearBound, shape: torch.Size
) -> LinearBound:
    if layer.training:
        raise _RULES.unsupported(layer, IN_TRAINING)
    if layer.running_var is None:
        raise _RULES.unsupported(layer, "it has no running statistics")
    return pull_back_affine(layer, bound, shape)


def _per_channel(bound: LinearBound, scale: Tensor, shift: Tensor) -> LinearBound:
    coefficients = bound.coefficients
    per_channel = scale.view(-1, *[1] * (coefficients.ndim - 3))
    sums = coefficients.unsqueeze(3).flatten(3).sum(3)
    return LinearBound(coefficients * per_channel, bound.constant + sums @ shift)
