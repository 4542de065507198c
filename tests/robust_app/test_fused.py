"""Pieces with gradients of their own, beside what autograd makes of their formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robust_app.fused import relu_box, split_by_sign


def relu_box_by_its_formula(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    upper, lower = (center + radius).relu(), (center - radius).relu()
    return (upper + lower) / 2, (upper - lower) / 2


def split_by_its_formula(a: Tensor, positive: Tensor, negative: Tensor, offset: Tensor):
    positive, negative, offset = (v.unsqueeze(1) for v in (positive, negative, offset))
    above, below = a.relu(), -(-a).relu()
    return above * positive + below * negative, (below * offset).sum(2)


def boxes(seed: int) -> tuple[Tensor, Tensor]:
    """Active, inactive and open neurons, radii of 0 among them."""
    generator = torch.Generator().manual_seed(seed)
    center, radius = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    return center.requires_grad_(), radius.relu().requires_grad_()


def bounds(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64)
    lines = torch.randn(3, 3, 7, generator=generator, dtype=torch.float64)
    return a.requires_grad_(), *(line.requires_grad_() for line in lines)


CASES = [(relu_box, relu_box_by_its_formula, boxes), (split_by_sign, split_by_its_formula, bounds)]


@given(seed=st.integers(0, 2**32 - 1), case=st.sampled_from(CASES))
def test_values_and_gradients_are_the_formulas(seed, case):
    fused, formula, arguments = case
    inputs = arguments(seed)
    found, expected = fused(*inputs), formula(*inputs)
    torch.testing.assert_close(found, expected)
    directions = [torch.randn_like(part) for part in expected]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, directions),
        torch.autograd.grad(expected, inputs, directions),
    )


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(wanted):
    inputs = [part.detach().requires_grad_(i == wanted) for i, part in enumerate(bounds(0))]
    found, expected = split_by_sign(*inputs), split_by_its_formula(*inputs)
    # Where the offsets alone are wanted, the first output has no graph.
    [gradient] = torch.autograd.grad(sum(part.sum() for part in found), inputs[wanted])
    [other] = torch.autograd.grad(sum(part.sum() for part in expected), inputs[wanted])
    torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize(("fused", "arguments"), [(relu_box, boxes), (split_by_sign, bounds)])
def test_backward_passes_can_be_vectorised(fused, arguments):
    """As libraries do that need the gradients of several losses at once."""
    inputs = arguments(0)
    outputs = fused(*inputs)
    for index in range(2):
        several = torch.randn(5, *outputs[index].shape, dtype=torch.float64)
        batched = torch.autograd.grad(
            outputs[index], inputs, several, retain_graph=True, is_grads_batched=True
        )
        for number, one in enumerate(several):
            alone = torch.autograd.grad(outputs[index], inputs, one, retain_graph=True)
            torch.testing.assert_close([part[number] for part in batched], list(alone))


def test_ends_at_0_pass_no_gradient_on():
    center = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    radius = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
    torch.autograd.backward(relu_box(center, radius), [torch.ones(3), torch.zeros(3)])
    assert center.grad.tolist() == [0.5, 0, 0]
    assert radius.grad.tolist() == [0.5, 0, 0]


def test_a_box_without_radius_is_relu_to_the_bit():
    center = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    new_center, new_radius = relu_box(center, torch.zeros(1000))
    assert torch.equal(new_center, center.relu())
    assert torch.equal(new_radius, torch.zeros(1000))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_boxes_hold_what_they_must(kind):
    """Centre and radius are rounded, by a unit in the last place of the upper end each."""
    generator = torch.Generator().manual_seed(0)
    center, radius = torch.randn(2, 10_000, generator=generator).to(kind)
    radius = radius.abs()
    new_center, new_radius = relu_box(center, radius)
    upper, lower = (center + radius).relu(), (center - radius).relu()
    slack = 2 * torch.finfo(kind).eps * upper
    assert (new_radius >= 0).all()
    assert (new_center + new_radius >= upper - slack).all()
    assert (new_center - new_radius <= lower + slack).all()


def test_twice_differentiating_is_refused():
    center, radius = boxes(0)
    loss = relu_box(center, radius)[0].square().sum()
    [first] = torch.autograd.grad(loss, center, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
