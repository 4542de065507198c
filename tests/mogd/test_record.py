"""What a record tells beyond what it holds: the cosines of the moments."""

import math

import pytest
import torch
from chosen import AGREEING, CONFLICTING, doubles, linear, optimizer_after, parameter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from mogd import Record


def record_of(moments):
    """A record of moments, ``(K, n)``."""
    k = len(moments)
    zeros = torch.zeros(k, dtype=torch.float64)
    lengths = torch.linalg.vector_norm(moments, dim=1)
    finite = torch.ones(k, dtype=torch.bool)
    return Record(zeros, zeros, zeros, moments @ moments.T, lengths, torch.tensor(0), finite)


@pytest.mark.parametrize(
    ("gradients", "cosine"), [(AGREEING, 12 / 15), (CONFLICTING, -12 / 15), (((1, 0), (0, 2)), 0)]
)
def test_the_cosines_computed_by_hand(gradients, cosine):
    p, optimizer = optimizer_after(gradients)
    record = optimizer.backward([linear(p, gradient) for gradient in AGREEING])
    assert_close(record.cosines, doubles([1, cosine], [cosine, 1]))


def test_the_factors_are_what_the_gradients_were_multiplied_by():
    p, optimizer = optimizer_after(CONFLICTING, priority=lambda _: 1)
    record = optimizer.backward([linear(p, (1, 0), value=5.0), linear(p, (0, 1), value=3.0)])
    assert_close(record.factors, doubles(4 / 3, 1 + 2 * 0.5 * 3.0))
    assert_close(p.grad, record.factors)


def test_they_are_of_the_past_and_not_of_this_batch():
    p, optimizer = optimizer_after()
    cosines = []
    for gradients in (AGREEING, CONFLICTING, AGREEING):
        optimizer.zero_grad()
        record = optimizer.backward([linear(p, gradient) for gradient in gradients])
        cosines.append(record.cosines[0, 1].item())
    # Before the third, m₁ lies along (1, 0) and m₂ along 0.9 (4, 3) + (-4, 3) = (-0.4, 5.7).
    assert cosines == pytest.approx([0.0, 0.8, -0.4 / math.hypot(0.4, 5.7)])


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**20), st.data())
def test_they_are_cosines_at_any_scale(k, n, seed, data):
    generator = torch.Generator().manual_seed(seed)
    moments = torch.randn(k, n, generator=generator, dtype=torch.float64)
    moments *= 10.0 ** doubles(*(data.draw(st.integers(-30, 30)) for _ in range(k)))[:, None]
    cosines = record_of(moments).cosines
    units = moments / torch.linalg.vector_norm(moments, dim=1, keepdim=True)
    assert_close(cosines, cosine_similarity(units[:, None], units[None], dim=2))
    assert_close(cosines.diagonal(), torch.ones(k, dtype=torch.float64))
    assert torch.equal(cosines, cosines.T)
    assert cosines.abs().max() <= 1


@pytest.mark.parametrize("gradients", [((0, 0), (3, 4)), ((3, 4), (0, 0)), ((0, 0), (0, 0))])
def test_a_moment_of_zero_has_no_direction(gradients):
    cosines = record_of(doubles(*gradients)).cosines
    assert_close(cosines, torch.diag(doubles(*(float(any(gradient)) for gradient in gradients))))


def test_three_losses_have_a_cosine_a_pair():
    cosines = record_of(doubles([1, 0], [1, 1], [-2, 0])).cosines
    half = 0.5**0.5
    assert_close(cosines, doubles([1, half, -1], [half, 1, -half], [-1, -half, 1]))


def test_they_stay_where_the_parameters_are_and_need_no_graph():
    _, optimizer = optimizer_after(AGREEING, p=parameter(0.0, 0.0, dtype=torch.float32))
    assert not optimizer.last.cosines.requires_grad
    assert optimizer.last.cosines.dtype == torch.float64
