"""The first-order stationary condition (paper, A.3)."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robust_app.fosc import Stationarity, fosc


@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_fosc_is_the_largest_first_order_gain_within_the_ball(seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    x_adv = x + epsilon * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)

    values = fosc(x, x_adv, gradient, epsilon)

    # max over the ball of <x' - x_adv, gradient> (paper, eq. 6) is attained at a corner.
    best = x + epsilon * gradient.sign()
    torch.testing.assert_close(values, ((best - x_adv) * gradient).sum(1))
    assert (values >= -1e-12).all()


def test_fosc_vanishes_at_the_corner_the_gradient_points_to():
    x, gradient = torch.zeros(2, 1, 2), torch.tensor([[[1.0, -2.0]], [[-3.0, 4.0]]])

    values = fosc(x, x + 0.25 * gradient.sign(), gradient, 0.25)

    torch.testing.assert_close(values, torch.zeros(2))


def test_fosc_in_a_box_by_hand():
    """A radius for each entry: 0.5·2 + 0.25·4 around the centre; at its best corner nothing."""
    center, radius = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    gradient = torch.tensor([[2.0, -4.0]])
    assert fosc(center, center, gradient, radius).tolist() == [2.0]
    corner = center + radius * gradient.sign()
    assert fosc(center, corner, gradient, radius).tolist() == [0.0]
    opposite = center - radius * gradient.sign()
    assert fosc(center, opposite, gradient, radius).tolist() == [4.0]


@given(st.integers(0, 2**31))
def test_fosc_in_a_box_is_the_largest_first_order_gain_at_a_corner(seed):
    generator = torch.Generator().manual_seed(seed)
    center, gradient = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    radius, at = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    x_adv = center + radius * (2 * at - 1)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    corners = center.unsqueeze(1) + signs * radius.unsqueeze(1)  # (3, 16, 4)
    gains = ((corners - x_adv.unsqueeze(1)) * gradient.unsqueeze(1)).sum(2)

    values = fosc(center, x_adv, gradient, radius)

    torch.testing.assert_close(values, gains.max(1).values)
    assert (values >= -1e-12).all()


def test_stationarity_averages_each_example_with_the_gradient_of_its_own_loss():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, labels = torch.rand(6, 4), torch.randint(3, (6,))
    x_adv = (x + 0.1 * (2 * torch.rand(6, 4) - 1)).requires_grad_()
    measure = Stationarity()
    measure.observe(x, x_adv, 0.1)
    loss = F.cross_entropy(network(x_adv), labels)
    loss.backward()

    by_hand = []
    for index in range(6):
        one = x_adv.detach()[index : index + 1].requires_grad_()
        F.cross_entropy(network(one), labels[index : index + 1]).backward()
        by_hand.append(fosc(x[index : index + 1], one.detach(), one.grad, 0.1))

    torch.testing.assert_close(measure(torch.stack([loss.detach()] * 2)), torch.cat(by_hand).mean())


def test_stationarity_refuses_to_measure_what_was_not_differentiated():
    measure = Stationarity()
    with pytest.raises(RuntimeError, match="observe"):
        measure(torch.zeros(2))
    measure.observe(torch.zeros(1, 2), torch.zeros(1, 2, requires_grad=True), 0.1)
    with pytest.raises(RuntimeError, match="backward"):
        measure(torch.zeros(2))
