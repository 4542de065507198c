"""Convolutions of images on the CPU: their input gradients by a product and a fold.

Where a patch holds no more numbers than there are output channels, as in a first layer, the
transposed convolution that the input gradient is takes several times as long on a CPU as a product
with the weights and ``F.fold``; all other passes are as fast as can be.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

Geometry = tuple[Any, Any, Any]
"""Stride, padding and dilation."""


def applies(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether a layer's passes over tensors like ``x`` gain from what is here."""
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return x.is_cpu and plain and layer.groups == 1 and layer.weight[0].numel() <= len(layer.weight)


def geometry_of(layer: nn.Conv2d) -> Geometry:
    """What :func:`transposed` needs to know."""
    return layer.stride, layer.padding, layer.dilation


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, with a faster gradient of its input where that :func:`applies`.

    >>> x = torch.ones(1, 1, 2, 2, requires_grad=True)
    >>> layer = Conv2d(1, 4, 2, bias=False)
    >>> layer(x).sum().backward()
    >>> torch.allclose(x.grad, layer.weight.sum(0, keepdim=True))
    True
    """

    # Not forward: to bounds, to whatever else asks for the type, this is an nn.Conv2d.
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor
        if torch.is_grad_enabled() and input.requires_grad and applies(self, input):
            output = _Convolution.apply(input, weight, bias, geometry_of(self))
        else:
            output = super()._conv_forward(input, weight, bias)
        return output


def transposed(outputs: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """The convolution's transpose, differentiable.

    Args:
        outputs: ``(batch, out_channels, height, width)``.
        weight: of the convolution.
        size: height and width of its inputs.
        geometry: of it.

    Returns:
        ``(batch, in_channels, *size)``.
    """
    inputs: Tensor = _Transposed.apply(outputs, weight, size, geometry)
    return inputs


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (saved.to(of_output.dtype) for saved in ctx.saved_tensors)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _by_patches(of_output, weight, x.shape[2:], ctx.geometry)
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(x, weight, of_output, ctx.geometry)
        if ctx.needs_input_grad[2]:
            of_bias = of_output.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(outputs, weight)
        ctx.geometry = geometry
        return _by_patches(outputs, weight, size, geometry)

    @staticmethod
    def backward(ctx: Any, of_inputs: Tensor) -> tuple[Tensor | None, ...]:
        outputs, weight = (saved.to(of_inputs.dtype) for saved in ctx.saved_tensors)
        of_outputs = of_weight = None
        if ctx.needs_input_grad[0]:
            of_outputs = F.conv2d(of_inputs, weight, None, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(of_inputs, weight, outputs, ctx.geometry)
        return of_outputs, of_weight, None, None


def _by_patches(outputs: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    stride, padding, dilation = geometry
    to_patch = weight.flatten(1).T.expand(len(outputs), -1, -1)
    # In the factors' own format, also where an attack differentiates within autocast.
    with torch.autocast(outputs.device.type, enabled=False):
        patches = to_patch.bmm(outputs.flatten(2))
    # Copied, for what fold returns lies in memory as large as that of the patches.
    return F.fold(patches, size, weight.shape[2:], dilation, padding, stride).clone()


def _weight_gradient(x: Tensor, weight: Tensor, of_output: Tensor, geometry: Geometry) -> Tensor:
    gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        x, weight.shape, of_output, *geometry
    )
    return gradient
