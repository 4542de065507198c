import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_app.config import load_recipe
from robust_app.schedules import (
    Phase,
    Setting,
    fosc_threshold,
    phase,
    setting,
    smoothed_ramp,
    step_decay,
)

times = st.floats(-10, 100)
lengths = st.floats(0.1, 50)
middles = st.floats(0, 1)
powers = st.floats(1, 8)


@pytest.mark.parametrize(
    ("t", "expected"),
    # middle 1/4, power 4: the line starts at (1/4) / (1/4 + 4·3/4) = 1/13 with slope 16/13.
    [
        (-1, 0.0),
        (0, 0.0),
        (1, 1 / 13 / 16),
        (2, 1 / 13),
        (4, 1 / 13 + 4 / 13),
        (8, 1.0),
        (9, 1.0),
    ],
)
def test_ramp_has_the_values_computed_by_hand(t, expected):
    assert smoothed_ramp(t, 8) == pytest.approx(expected)


def test_ramp_of_no_length_is_a_jump():
    assert [smoothed_ramp(t, 0) for t in (-0.1, 0, 0.1)] == [0, 1, 1]


@pytest.mark.parametrize("power", [1, 3])
def test_ramp_at_the_ends_of_middle_is_a_line_or_a_power(power):
    assert smoothed_ramp(2, 8, middle=0, power=power) == pytest.approx(0.25)
    assert smoothed_ramp(2, 8, middle=1, power=power) == pytest.approx(0.25**power)


@given(times, times, lengths, middles, powers)
def test_ramp_stays_in_the_unit_interval_and_never_falls(s, t, length, middle, power):
    early, late = (smoothed_ramp(x, length, middle, power) for x in sorted((s, t)))
    assert 0 <= early <= late + 1e-12
    assert late <= 1


@given(lengths, st.floats(0.05, 0.95), powers)
def test_ramp_joins_its_two_pieces_with_one_slope(length, middle, power):
    h = 1e-5
    before, at, after = (
        smoothed_ramp((middle + x) * length, length, middle, power) for x in (-h, 0, h)
    )
    assert (at - before) / h == pytest.approx((after - at) / h, rel=1e-2)


@given(lengths, st.floats(0.05, 0.9), powers)
def test_ramp_is_straight_after_its_middle(length, middle, power):
    start, halfway = (
        smoothed_ramp(u * length, length, middle, power) for u in (middle, (1 + middle) / 2)
    )
    assert halfway == pytest.approx((start + 1) / 2)


@pytest.mark.parametrize(
    ("t", "expected"), [(-5, 0.5), (10, 0.5), (15, 0.375), (29, 0.025), (30, 0), (99, 0)]
)
def test_fosc_threshold_has_the_values_computed_by_hand(t, expected):
    assert fosc_threshold(t, maximum=0.5, start=10, decay=20) == pytest.approx(expected)


def test_fosc_threshold_without_decay_drops_at_the_start():
    assert [fosc_threshold(t, 0.5, start=10, decay=0) for t in (9.99, 10, 11)] == [0.5, 0, 0]


@given(times, st.floats(0, 10), st.floats(0, 50), st.floats(0.1, 50))
def test_fosc_threshold_is_the_formula_of_the_paper(t, maximum, start, decay):
    line = maximum - (t - start) * maximum / decay
    expected = min(max(line, 0), maximum)
    found = fosc_threshold(t, maximum, start, decay)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 <= found <= maximum


def test_step_decay_counts_a_milestone_once_it_is_reached():
    rates = [step_decay(t, 1.0, (2, 4), 0.5) for t in (0, 1.99, 2, 3.99, 4, 100)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_step_decay_without_milestones_is_constant():
    assert step_decay(1e9, 0.3, (), 0.1) == 0.3


@given(times, st.lists(st.floats(0, 100)), st.randoms())
def test_step_decay_takes_milestones_in_any_order(t, milestones, random):
    shuffled = random.sample(milestones, len(milestones))
    assert step_decay(t, 1.0, milestones, 0.5) == step_decay(t, 1.0, shuffled, 0.5)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0, Phase.NATURAL),
        (1.9, Phase.NATURAL),
        (2, Phase.ADVERSARIAL),
        (4.9, Phase.ADVERSARIAL),
        (5, Phase.JOINT),
    ],
)
def test_phases_follow_one_another(t, expected):
    assert phase(t, natural_epochs=2, adversarial_epochs=3) is expected


@pytest.mark.parametrize(
    ("natural", "adversarial", "first"),
    [(0, 0, Phase.JOINT), (0, 1, Phase.ADVERSARIAL), (1, 0, Phase.NATURAL)],
)
def test_a_phase_of_no_length_is_left_out(natural, adversarial, first):
    assert phase(0, natural, adversarial) is first


@pytest.mark.parametrize(
    ("t", "expected"),
    # Appendix A.5: T_nat 10, T_adv 40, R 50, T' 50, c_max 1e-4, lr / 4 at epochs 150 and 200.
    [
        (9.9, Setting(Phase.NATURAL, 0.0, 1e-4, 5e-4)),
        (10, Setting(Phase.ADVERSARIAL, 0.4, 1e-4, 5e-4)),
        (50, Setting(Phase.JOINT, 0.0, 1e-4, 5e-4)),
        (62.5, Setting(Phase.JOINT, 0.4 / 13, 1e-4, 5e-4)),
        (100, Setting(Phase.JOINT, 0.4, 1e-4, 5e-4)),
        (125, Setting(Phase.JOINT, 0.4, 0.5e-4, 5e-4)),
        (150, Setting(Phase.JOINT, 0.4, 0.0, 1.25e-4)),
        (249, Setting(Phase.JOINT, 0.4, 0.0, 3.125e-5)),
    ],
)
def test_the_schedules_of_the_papers_mnist_run_by_hand(t, expected):
    found = setting(load_recipe("mnist-dm-small"), t)
    assert found.phase is expected.phase
    assert found.epsilon == pytest.approx(expected.epsilon)
    assert found.fosc_threshold == pytest.approx(expected.fosc_threshold)
    assert found.learning_rate == pytest.approx(expected.learning_rate)
