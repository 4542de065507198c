"""The elementwise work of bounds, each piece as one autograd node.

Between the products of a network, bounds are limited by memory: autograd would save and pass over
many tensors of a layer's size. These save one or two, and work in place where nobody can see it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def relu_box(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and radius of ReLU([c - r, c + r]): half the sum and difference of its ends.

    Args:
        center: c, any shape.
        radius: r >= 0, same shape.

    >>> relu_box(torch.tensor([-3.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 1.0]))
    (tensor([0.0000, 0.5000, 3.0000]), tensor([0.0000, 0.5000, 1.0000]))
    """
    boxes: tuple[Tensor, Tensor] = _ReluBox.apply(center, radius)
    return boxes


class _ReluBox(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        upper, lower = (center + radius).relu_(), (center - radius).relu_()
        new_center = lower.lerp_(upper, 0.5)
        new_radius = upper.sub_(new_center)
        ctx.save_for_backward(new_center, new_radius)
        return new_center, new_radius

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_center: Tensor, of_radius: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = ctx.saved_tensors
        # An end passes its gradient on where it is above 0, after the ReLU as before it.
        of_lower = _where_above_0(of_center - of_radius, center - radius)
        of_upper = _where_above_0(of_center + of_radius, center)
        new_of_center = torch.lerp(of_lower, of_upper, 0.5)
        return new_of_center, of_upper.sub_(new_of_center)


def split_by_sign(
    coefficients: Tensor, positive: Tensor, negative: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """A⁺α + A⁻s, and the sum of A⁻o: linear functions through a layer's two lines.

    Args:
        coefficients: A, ``(batch, spec, n)``, A⁺ = max(A, 0) and A⁻ = min(A, 0).
        positive: α, slopes of the lines below, ``(batch, n)``.
        negative: s, slopes of the lines above, ``(batch, n)``.
        offset: o, where the lines above meet the axis, ``(batch, n)``.

    Returns:
        ``(batch, spec, n)`` and ``(batch, spec)``.

    >>> a = torch.tensor([[[2.0, -2.0]]])
    >>> split_by_sign(a, torch.zeros(1, 2), torch.full((1, 2), 0.5), torch.ones(1, 2))
    (tensor([[[ 0., -1.]]]), tensor([[-2.]]))
    """
    parts: tuple[Tensor, Tensor] = _SplitBySign.apply(coefficients, positive, negative, offset)
    return parts


class _SplitBySign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, positive: Tensor, negative: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(coefficients, positive, negative, offset)
        below = coefficients.clamp(max=0)
        slopes = negative - positive
        new = (coefficients * positive.unsqueeze(1)).addcmul_(below, slopes.unsqueeze(1))
        return new, below.mul_(offset.unsqueeze(1)).sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_new: Tensor, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, positive, negative, offset = ctx.saved_tensors
        of_sum = of_sum.unsqueeze(2)
        of_coefficients = of_positive = of_negative = of_offset = None
        if ctx.needs_input_grad[0]:
            # As if all were A⁻; then the difference where they are A⁺.
            as_below = torch.addcmul(of_sum * offset.unsqueeze(1), of_new, negative.unsqueeze(1))
            change = torch.addcmul(-as_below, of_new, positive.unsqueeze(1))
            of_coefficients = as_below + _where_above_0(change, coefficients)
        if ctx.needs_input_grad[1]:
            of_positive = (of_new * coefficients.clamp(min=0)).sum(1)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            below = coefficients.clamp(max=0)
            of_negative = (of_new * below).sum(1)
            of_offset = (below * of_sum).sum(1)
        return of_coefficients, of_positive, of_negative, of_offset


def _where_above_0(gradient: Tensor, values: Tensor) -> Tensor:
    """``gradient``, 0 where ``values`` are not above 0: much faster than where."""
    masked: Tensor = torch.ops.aten.threshold_backward(gradient, values, 0)
    return masked
