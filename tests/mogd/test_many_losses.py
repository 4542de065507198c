"""The paper's rule for three losses and more, and that two are weighed as the paper says."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from vectors import RULE, doubles, gramian, norms, vectors, weigh

from mogd import BisectorProjection, Fixed, UnbiasedMultiGradient
from mogd.bisector_projection import bisector
from mogd.rules import conflicting

OF_MOMENTS = BisectorProjection(length="norm_of_mean")
fewer = settings(max_examples=80)


@st.composite
def moments(draw, fewest=3, most=6):
    """K moments of their own scales in a space where they may be dependent, and a favoured one."""
    losses, size = draw(st.integers(fewest, most)), draw(st.integers(2, 8))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    m = torch.randn(losses, size, generator=random, dtype=torch.float64)
    lean = draw(st.sampled_from([0.0, 1.0, 4.0]))  # from mostly in conflict to mostly in agreement
    m = m + lean * torch.randn(size, generator=random, dtype=torch.float64)
    scales = 10.0 ** (6 * torch.rand(losses, 1, generator=random, dtype=torch.float64) - 3)
    return m * scales, draw(st.integers(0, losses - 1))


def in_conflict(m, favoured):
    return bool(conflicting(gramian(m), norms(m), torch.tensor(favoured)))


def all_agree(m):
    return not any(in_conflict(m, k) for k in range(len(m)))


def against(m, favoured):
    return [k for k in range(len(m)) if k != favoured and m[k] @ m[favoured] <= 0]


def as_the_paper_has_it(gramian, v, favoured):
    """Algorithm 1, lines 12-22, written for two losses alone."""
    if gramian[0, 1] <= 0:
        weights = -gramian[0, 1] / v / v
        weights[favoured] = 1.0
        return weights
    scale = v.reciprocal()
    onto_direction = gramian @ scale
    return onto_direction.mean() / (scale @ onto_direction) * scale


@fewer
@given(moments(2, 2), st.floats(0.5, 4), st.floats(0.5, 4))
def test_two_losses_are_weighed_as_in_the_paper_to_the_bit(drawn, ratio_1, ratio_2):
    m, favoured = drawn
    v = norms(m) * doubles(ratio_1, ratio_2)
    assert torch.equal(weigh(m, favoured, v).weights, as_the_paper_has_it(gramian(m), v, favoured))


def test_agreement_of_three_has_the_values_computed_by_hand():
    # d = (2, 1) + (1, 2) + (1, 1) = (4, 4), γ = ⅓ ⟨(4, 4), d⟩ / ‖d‖² = ⅓
    m = doubles([2, 1], [1, 2], [1, 1])
    assert_close(weigh(m, 0, doubles(1, 1, 1)).weights, doubles(1, 1, 1) / 3)


def test_the_projection_of_three_has_the_values_computed_by_hand():
    # m₁ = (1, 1, 1) is against m₂ = (-1, 0, 0) and m₃ = (-1, -1, 0): their span is z = 0, so
    # u = (0, 0, 1) = m₁ + 0 m₂ + 1 m₃.
    m = doubles([1, 1, 1], [-1, 0, 0], [-1, -1, 0])
    weights = weigh(m, 0).weights
    assert_close(weights, doubles(1, 0, 1))
    assert_close(weights @ m, doubles(0, 0, 1))


def test_with_mean_norms_twice_the_moments_the_projection_has_the_values_computed_by_hand():
    # m₁ = (1, 1), m₂ = (-1, 0), m₃ = (0, -1), all v doubled: R = 1, κ₂ = 1/2², κ₃ = 1/2².
    m = doubles([1, 1], [-1, 0], [0, -1])
    assert_close(weigh(m, 0, 2 * norms(m)).weights, doubles(1, 0.25, 0.25))


def test_of_three_a_length_is_at_least_that_of_the_moment():
    # m₁ = (1, 1) is against unit vectors of cosine 0.6 with v below 1: ⟨m_C, m₁⟩ = (-1, -1.4), R⁻¹
    # of it (-0.25, -1.25). With the v for lengths, more than m₁'s part in the span were removed.
    m = doubles([1, 1], [-1, 0], [-0.6, -0.8])
    assert_close(weigh(m, 0, doubles(1, 0.5, 0.2)).weights, doubles(1, 0.25, 1.25))


def test_of_moments_that_nearly_agree_against_the_favoured_one_the_first_is_removed():
    # Their squared sine is 0.0025; told apart, they would get 1.4 and -0.4.
    m = doubles([1, 0.2, 0.02], [-1, 0, 0], [-1, 0, 0.05])
    assert_close(weigh(m, 0).weights, doubles(1, 1, 0))


@pytest.mark.parametrize("silent", [[0, 0, 0], [0, 0, 2]])  # no gradient; a head of its own
@pytest.mark.parametrize("favoured", [0, 2])
def test_a_loss_that_has_nothing_to_do_with_the_others_is_no_reason_to_favour_one(silent, favoured):
    m = doubles([1, 0, 0], [1, 1, 0], silent)
    weights = weigh(m, favoured).weights
    step = weights @ m
    assert (m[:2] @ step > 0).all()
    assert (weights[2] > 0) == (silent != [0, 0, 0])


def test_a_loss_that_agrees_with_the_favoured_one_takes_no_part_in_conflict():
    m = doubles([1, 0, 1], [-1, 0, 0], [0, 1, 1])
    assert_close(weigh(m, 0).weights, doubles(1, 1, 0))


def test_a_conflict_between_others_than_the_favoured_one_is_none():
    m = doubles([1, 1, 3], [1, -1, 0.5], [-1, 1, 0.5])
    assert not in_conflict(m, 0)
    assert in_conflict(m, 1)
    assert_close(weigh(m, 0).weights, bisector(gramian(m), norms(m)))


def test_a_loss_that_rises_along_the_sum_does_not_lengthen_the_step():
    # d = (0, 1) + (1, 0) + (1, 0) - (1, 0) = (1, 1), ⟨mₖ, d⟩ = 1, 1, 1, -9,
    # of which the last counts as 0: γ = ¾ / 2.
    m = doubles([0, 1], [1, 0], [1, 0], [-9, 0])
    assert_close(weigh(m, 0).weights, 3 / 8 * doubles(1, 1, 1, 1 / 9))


@fewer
@given(moments(), st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_without_conflict_the_favoured_loss_falls_whatever_the_others_do(drawn, ratios):
    m, favoured = drawn
    assume(not in_conflict(m, favoured))
    v = norms(m) * torch.tensor(ratios[: len(m)], dtype=torch.float64)
    step = weigh(m, favoured, v).weights @ m
    assert step @ m[favoured] > 0


@fewer
@given(moments())
def test_in_agreement_every_loss_falls_along_the_sum_of_the_normalised_moments(drawn):
    m, favoured = drawn
    assume(all_agree(m))
    step = weigh(m, favoured).weights @ m
    assert (m @ step > 0).all()
    direction = torch.nn.functional.normalize(m, dim=1).sum(0)
    assert_close(step / step.norm(), direction / direction.norm(), rtol=0, atol=1e-12)
    assert_close(step.norm(), (m @ (step / step.norm())).mean(), rtol=1e-9, atol=0)


@fewer
@given(moments())
def test_in_conflict_the_step_is_what_least_squares_leave_of_the_favoured_moment(drawn):
    m, favoured = drawn
    assume(in_conflict(m, favoured))
    step = weigh(m, favoured).weights @ m
    span = torch.nn.functional.normalize(m[against(m, favoured)], dim=1).T
    assume(span.numel() == 0 or torch.linalg.svdvals(span)[-1] > 0.3)  # far from dependent
    expected = m[favoured]
    if span.numel():
        fit = torch.linalg.lstsq(span, expected[:, None]).solution
        expected = expected - (span @ fit)[:, 0]
    assert_close(step, expected, rtol=0, atol=1e-9 * float(m[favoured].norm()))


@fewer
@given(moments())
def test_in_conflict_the_favoured_loss_never_rises_and_those_against_it_hardly_change(drawn):
    m, favoured = drawn
    assume(in_conflict(m, favoured))
    step = weigh(m, favoured).weights @ m
    assert step @ m[favoured] >= -1e-9 * m[favoured].square().sum()
    for other in against(m, favoured):
        assert abs(step @ m[other]) <= 0.1 * m[favoured].norm() * m[other].norm()


@fewer
@given(moments(), st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_norms_of_whatever_size_never_turns_the_step_against_the_favoured_loss(drawn, ratios):
    m, favoured = drawn
    v = norms(m) * torch.tensor(ratios[: len(m)], dtype=torch.float64)
    step = weigh(m, favoured, v).weights @ m
    assert step @ m[favoured] >= -1e-9 * m[favoured].square().sum()


@fewer
@given(moments(), st.lists(st.floats(0.1, 10), min_size=6, max_size=6), st.randoms())
def test_the_order_of_the_losses_does_not_count(drawn, ratios, random):
    m, favoured = drawn
    unit = torch.nn.functional.normalize(m[against(m, favoured)], dim=1)
    assume(len(unit) == 0 or len(unit) <= m.shape[1])
    assume(len(unit) == 0 or torch.linalg.svdvals(unit)[-1] > 0.3)  # else the first ones are taken
    v = norms(m) * torch.tensor(ratios[: len(m)], dtype=torch.float64)
    order = random.sample(range(len(m)), len(m))
    weights = weigh(m, favoured, v).weights
    shuffled = weigh(m[order], order.index(favoured), v[order]).weights
    within = 1e-5 * float((weights * v).abs().max())  # in units of the step's parts
    assert_close(shuffled * v[order], (weights * v)[order], rtol=0, atol=within)


@fewer
@given(moments(), st.integers(-20, 20))
def test_a_common_scale_leaves_the_weights(drawn, exponent):
    m, favoured = drawn
    scaled = weigh(m * 2.0**exponent, favoured).weights
    assert_close(scaled, weigh(m, favoured).weights, rtol=1e-9, atol=0)


scales = st.sampled_from([0.0, 1e-30, 1.0, 1e30])


@fewer
@given(moments(), st.lists(scales, min_size=12, max_size=12), st.booleans(), st.booleans())
def test_weights_are_always_finite(drawn, sizes, parallel, opposite):
    m, favoured = drawn
    if parallel:
        m[1] = 3 * m[0]
    if opposite:
        m[2] = -m[1]
    m = torch.nn.functional.normalize(m, dim=1) * doubles(*sizes[: len(m)])[:, None]
    for v, rule in (
        (norms(m), RULE),
        (doubles(*sizes[6 : 6 + len(m)]), RULE),
        (norms(m), OF_MOMENTS),
    ):
        weighting = weigh(m, favoured, v, rule)
        assert weighting.weights.isfinite().all()
        assert weighting.regularization.isfinite().all()


@pytest.mark.parametrize(("favoured", "expected"), [(0, 0), (1, 0.5), (2, 0.5)])
def test_a_favoured_loss_other_than_the_first_is_regularised(favoured, expected):
    m = doubles([1, 0], [-1, 0], [-1, 1])
    regularization = weigh(m, favoured).regularization
    assert regularization[favoured] == expected
    assert regularization.sum() == expected


def test_three_losses_train_to_a_point_where_none_falls_without_another_rising():
    # Minima at the corners of a triangle: every point within it is Pareto optimal.
    corners = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    point = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = UnbiasedMultiGradient([point], lr=0.05, moment_decay=(0.5, 0.5), priority=Fixed(0))
    for _ in range(400):
        optimizer.zero_grad()
        optimizer.backward([(point - corner).square().sum() for corner in corners])
        optimizer.step()
    x, y = point.tolist()
    assert min(x, y) > -0.05
    assert x + y < 2.05


@pytest.mark.parametrize("losses", [2, 3])
@pytest.mark.parametrize("decay", [(0.9, 0.9), (0.0, 0.9)])
def test_a_loss_whose_gradient_vanishes_never_takes_the_others_along(losses, decay):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = UnbiasedMultiGradient([p], lr=0.0, moment_decay=decay)
    for step in range(1000):
        on = 1.0 if step < 20 else 0.0
        others = [p.sum(), 2 * p[1]][: losses - 1]
        record = optimizer.step(lambda on=on, others=others: (on * p[0], *others))
        assert (record.weights[1:] > 0.01).all()
    assert record.weights[0] == 0


def test_a_favoured_loss_without_a_gradient_leaves_its_place_to_the_next():
    m = doubles([0, 0], [1, 0], [-0.999, 0.01])
    weighting = weigh(m, 0)
    as_two = weigh(m[1:], 0)
    assert_close(weighting.weights[1:], as_two.weights)
    assert weighting.weights[0] == 0
    assert weighting.regularization.tolist() == [0, 0, 0]
    assert conflicting(gramian(m), norms(m), torch.tensor(0))
    assert weigh(m, 2).weights[2] == 1  # one with a gradient keeps it
    last = m[[1, 2, 0]]  # in conflict, which it has no part in
    assert weigh(last, 2).regularization.tolist() == [0, 0, 0]


@given(vectors(3), st.floats(-3, 3))
def test_opposed_losses_beside_one_without_a_gradient_get_no_huge_weights(first, factor):
    assume(abs(factor) > 0.1)
    m = torch.stack([torch.zeros_like(first), first, factor * first])
    weights = weigh(m, 0).weights
    lengths = norms(m)
    assert (weights.abs() <= 2 * max(1.0, *(lengths[1:] / lengths[1:].flip(0)).tolist())).all()
