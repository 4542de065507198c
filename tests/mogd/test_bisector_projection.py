import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from vectors import RULE, cosine, doubles, exponents, gramian, norms, vectors, weigh

from mogd import BisectorProjection
from mogd.bisector_projection import bisector, projection
from mogd.rules import conflicting

OF_MOMENTS = BisectorProjection(length="norm_of_mean")
fewer = settings(max_examples=60)
indices = st.integers(0, 1)
booleans = st.booleans()


@st.composite
def pairs(draw, conflict=booleans):
    """m₁ and m₂ of one length between 2 and 6, each with a scale of its own."""
    n = draw(st.integers(2, 6))
    m = torch.stack([draw(vectors(n)), draw(vectors(n))])
    assume(abs(cosine(m)) > 1e-6)  # beyond doubt on one side of the jump
    return m * doubles(1, 1 if draw(conflict) == (cosine(m) < 0) else -1)[:, None]


AGREEING = doubles([3, 0], [4, 3])
CONFLICTING = doubles([3, 0], [-4, 3])


def test_bisector_has_the_values_computed_by_hand():
    # d = (1, 0) + (0.8, 0.6), γ = ½ ⟨(7, 3), d⟩ / ‖d‖² = ½ · 14.4 / 3.6 = 2
    assert_close(bisector(gramian(AGREEING), doubles(3, 5)), doubles(2 / 3, 2 / 5))


def test_bisector_of_norm_moments_above_the_moments_norms_has_the_values_computed_by_hand():
    # d = (0.5, 0) + (0.8, 0.6), γ = ½ · 10.9 / 2.05
    gamma = 5.45 / 2.05
    assert_close(bisector(gramian(AGREEING), doubles(6, 5)), doubles(gamma / 6, gamma / 5))


@pytest.mark.parametrize(
    ("favoured", "v", "expected"),
    [
        (0, (3, 5), (1, 12 / 25)),
        (1, (3, 5), (12 / 9, 1)),
        (0, (6, 10), (1, 12 / 100)),
        (1, (6, 10), (12 / 36, 1)),
    ],
)
def test_projection_has_the_values_computed_by_hand(favoured, v, expected):
    weights = projection(gramian(CONFLICTING), doubles(*v), torch.tensor(favoured))
    assert_close(weights, doubles(*expected))


@pytest.mark.parametrize("favoured", [0, 1])
def test_the_sign_of_the_inner_product_chooses_the_branch(favoured):
    index = torch.tensor(favoured)
    for m, expected in (
        (AGREEING, bisector(gramian(AGREEING), doubles(3, 5))),
        (CONFLICTING, projection(gramian(CONFLICTING), doubles(3, 5), index)),
    ):
        assert_close(weigh(m, favoured).weights, expected, rtol=0, atol=0)


@fewer
@given(pairs(conflict=st.just(False)), indices)
def test_in_agreement_the_step_bisects_the_angle_and_is_the_mean_projection(m, favoured):
    weights = weigh(m, favoured).weights
    assert (weights > 0).all()
    step = weights @ m
    direction = step / step.norm()
    onto_unit = torch.nn.functional.normalize(m, eps=0.0) @ direction
    assert_close(onto_unit[0], onto_unit[1], rtol=1e-9, atol=0)
    assert_close(step.norm(), (m @ direction).mean(), rtol=1e-9, atol=0)


@fewer
@given(pairs(conflict=st.just(True)), indices)
def test_in_conflict_the_step_is_orthogonal_to_the_other_and_never_opposed_to_the_favoured(m, i):
    step = weigh(m, i).weights @ m
    favoured, other = m[i], m[1 - i]
    assert weigh(m, i).weights[i] == 1
    assert abs(step @ other) <= 1e-12 * favoured.norm() * other.norm()
    assert step @ favoured >= -1e-12 * favoured.norm() ** 2


@fewer
@given(pairs(), indices, st.floats(1, 3), st.floats(1, 3))
def test_exchanging_losses_and_favoured_index_exchanges_the_weights(m, favoured, ratio_1, ratio_2):
    v = norms(m) * doubles(ratio_1, ratio_2)
    swapped = weigh(m.flip(0), 1 - favoured, v.flip(0)).weights
    assert_close(swapped.flip(0), weigh(m, favoured, v).weights, rtol=1e-12, atol=0)


@fewer
@given(pairs(), indices, st.integers(-30, 30))
def test_a_common_scale_leaves_the_weights(m, favoured, exponent):
    scaled = weigh(m * 10.0**exponent, favoured).weights
    assert_close(scaled, weigh(m, favoured).weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("favoured", [0, 1])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (3.0, 0.5)])
def test_the_step_jumps_where_agreement_ends(favoured, a, b):
    before, after = doubles([a, 0], [1e-12 * b, b]), doubles([a, 0], [0, b])
    # As ⟨m₁, m₂⟩ → 0⁺: d → u₁ + u₂ and γ → (a + b) / 4, so κ → γ (1/a, 1/b).
    limit = (a + b) / 4 * doubles(1 / a, 1 / b)
    assert_close(weigh(before, favoured).weights, limit)
    unit = torch.eye(2, dtype=torch.float64)[favoured]
    assert_close(weigh(after, favoured).weights, unit)
    jump = (weigh(after, favoured).weights - weigh(before, favoured).weights) @ after
    if a == b == 1:
        assert_close(jump.norm(), (after[0] - after[1]).norm() / 2)


def test_two_weights_never_jump_within_agreement_or_within_conflict():
    angles = torch.linspace(0.01, math.pi / 2 - 0.01, 200, dtype=torch.float64)
    for offset in (0.0, math.pi / 2):
        weights = torch.stack(
            [
                weigh(doubles([1, 0], [2 * math.cos(a), 2 * math.sin(a)]), 0).weights
                for a in (angles + offset).tolist()
            ]
        )
        assert weights.diff(dim=0).abs().max() < 0.02


def test_identical_moments_give_the_step_of_one():
    m = doubles([3, 4], [3, 4])
    assert_close(weigh(m, 0).weights @ m, m[0])


def test_parallel_moments_give_the_mean():
    m = doubles([3, 4], [30, 40])
    assert_close(weigh(m, 0).weights @ m, m.mean(0))


@pytest.mark.parametrize("favoured", [0, 1])
def test_opposite_moments_give_no_step(favoured):
    m = doubles([3, 4], [-6, -8])
    assert_close(weigh(m, favoured).weights @ m, doubles(0, 0))


@pytest.mark.parametrize("favoured", [0, 1])
def test_a_zero_moment_takes_no_part_and_stops_nobody(favoured):
    m = doubles([0, 0], [3, 4])
    weighting = weigh(m, favoured)
    assert_close(weighting.weights, doubles(0, 1 / 2))  # half, as of the mean of two projections
    assert not weighting.regularization.any()


scales = st.one_of(st.just(0.0), exponents.map(lambda exponent: 10.0**exponent))


@fewer
@given(st.data(), indices, scales, scales, scales, scales)
def test_weights_are_always_finite(data, favoured, a, b, v_1, v_2):
    unit = data.draw(vectors(3, st.just(0)))
    other = data.draw(st.one_of(vectors(3, st.just(0)), st.sampled_from([unit, -unit])))
    m = torch.stack([a * unit, b * other])
    for v, rule in ((norms(m), RULE), (doubles(v_1, v_2), RULE), (doubles(v_1, v_2), OF_MOMENTS)):
        weighting = weigh(m, favoured, v, rule)
        assert weighting.weights.isfinite().all()
        assert weighting.regularization.isfinite().all()


@pytest.mark.parametrize(
    ("m", "favoured", "expected"),
    [
        (AGREEING, 0, [0, 0]),
        (AGREEING, 1, [0, 0]),
        (CONFLICTING, 0, [0, 0]),
        (CONFLICTING, 1, [0, 0.5]),
    ],
)
def test_only_a_conflict_that_favours_the_second_is_regularised(m, favoured, expected):
    assert weigh(m, favoured).regularization.tolist() == expected


def test_the_regularisation_is_the_one_asked_for():
    for asked in (0.0, 2.0):
        rule = BisectorProjection(regularization=asked)
        assert weigh(CONFLICTING, 1, rule=rule).regularization.tolist() == [0, asked]


def test_the_favoured_index_may_be_of_any_integer_type():
    for dtype in (torch.int32, torch.int64):
        weights = RULE(gramian(CONFLICTING), doubles(3, 5), torch.tensor(1, dtype=dtype)).weights
        assert_close(weights, doubles(12 / 9, 1))


def test_a_preference_has_the_values_computed_by_hand():
    # d = 1·(1, 0) + 3·(0.8, 0.6) = (3.4, 1.8), γ = ½ ⟨(7, 3), d⟩ / ‖d‖² = 14.6 / 14.8
    gamma = 14.6 / 14.8
    weights = weigh(AGREEING, 0, rule=BisectorProjection(preference=(1, 3))).weights
    assert_close(weights, doubles(gamma / 3, 3 * gamma / 5))


preferences = st.floats(1e-3, 1e3)


@fewer
@given(pairs(conflict=st.just(False)), preferences, preferences)
def test_a_preference_is_the_ratio_of_the_steps_parts_in_units_of_the_norms(m, p_1, p_2):
    weights = weigh(m, 0, rule=BisectorProjection(preference=(p_1, p_2))).weights
    parts = weights * norms(m)
    assert_close(
        parts[0] / parts[1], torch.tensor(p_1 / p_2, dtype=torch.float64), rtol=1e-9, atol=0
    )
    step = weights @ m
    assert_close(step.norm(), (m @ (step / step.norm())).mean(), rtol=1e-9, atol=0)


@fewer
@given(pairs(conflict=st.just(False)), preferences)
def test_the_more_preferred_the_nearer_to_the_step(m, more):
    assume(cosine(m) < 1 - 1e-3)
    leaning = BisectorProjection(preference=(1.0, 1.0 + more))
    steps = [weigh(m, 0, rule=rule).weights @ m for rule in (RULE, leaning)]
    angles = [float(cosine(torch.stack([m[1], step]))) for step in steps]
    assert angles[1] > angles[0]


@fewer
@given(pairs(), indices, preferences)
def test_an_equal_preference_is_the_papers_rule_to_the_bit(m, favoured, preferred):
    rule = BisectorProjection(preference=(preferred, preferred))
    assert torch.equal(weigh(m, favoured, rule=rule).weights, weigh(m, favoured).weights)


@fewer
@given(pairs(conflict=st.just(True)), indices, preferences)
def test_in_conflict_the_priority_decides_whatever_is_preferred(m, favoured, preferred):
    rule = BisectorProjection(preference=(1.0, preferred))
    assert torch.equal(weigh(m, favoured, rule=rule).weights, weigh(m, favoured).weights)


@pytest.mark.parametrize("preference", [(1e-300, 1e300), (1e300, 1e300), (1e-300, 1e-300)])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_preference_makes_a_weight_infinite(preference, scale):
    weights = weigh(AGREEING * scale, 0, rule=BisectorProjection(preference=preference)).weights
    assert weights.isfinite().all()
    assert (weights @ AGREEING).norm() > 0


@pytest.mark.parametrize(
    "preference",
    [
        (1.0,),
        (),
        (0.0, 1.0),
        (-1.0, 1.0),
        (math.inf, 1.0),
        (math.nan, 1),
        (1, True),
        (10**400, 1),
        1.0,
        "12",
    ],
)
def test_a_bad_preference_is_refused(preference):
    with pytest.raises(
        ValueError, match=r"preference must be a tuple or list, a finite number above 0 for each"
    ):
        BisectorProjection(preference=preference)


def test_a_preference_may_be_a_list():
    rule = BisectorProjection(preference=[1, 3])
    assert rule == BisectorProjection(preference=(1.0, 3.0))
    assert hash(rule) == hash(BisectorProjection(preference=(1.0, 3.0)))


@fewer
@given(pairs(), indices, st.floats(1, 100), st.floats(1, 100))
def test_with_the_norm_of_the_mean_the_mean_norm_does_not_count(m, favoured, a, b):
    noisy = weigh(m, favoured, norms(m) * doubles(a, b), OF_MOMENTS)
    assert_close(noisy.weights, weigh(m, favoured).weights, rtol=1e-9, atol=0)
    if conflicting(gramian(m), norms(m), torch.tensor(favoured)):
        step, other = noisy.weights @ m, m[1 - favoured]
        assert abs(step @ other) <= 1e-9 * m[favoured].norm() * other.norm()


def test_scalars_of_numpy_are_numbers():
    rule = BisectorProjection(np.float32(0.25), (np.int64(1), np.float32(2)))
    assert rule == BisectorProjection(0.25, (1.0, 2.0))
    assert type(rule.regularization) is float


def test_an_unknown_length_is_refused():
    with pytest.raises(ValueError, match="length must be 'mean_norm' or 'norm_of_mean', got 'm'"):
        BisectorProjection(length="m")


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, None, True, 10**400])
def test_a_bad_regularisation_is_refused(value):
    with pytest.raises(
        ValueError, match=rf"regularization must be a number, finite .* got {value}"
    ):
        BisectorProjection(regularization=value)


def test_a_single_loss_is_refused():
    with pytest.raises(ValueError, match="weighs 2 losses or more, got 1"):
        weigh(doubles([1, 2]), 0)


def test_a_preference_for_another_number_of_losses_is_refused():
    with pytest.raises(ValueError, match=r"a number for each of 3 losses, got \(1.0, 2.0\)"):
        weigh(torch.eye(3, dtype=torch.float64), 0, rule=BisectorProjection(preference=(1, 2)))
