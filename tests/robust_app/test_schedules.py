"""Schedules: pure functions of the time in epochs, and what they make of a Config."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_app import recipes
from robust_app.schedules import (
    Phase,
    between,
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
        (5, Phase.MAIN),
    ],
)
def test_phases_follow_one_another(t, expected):
    assert phase(t, natural_epochs=2, adversarial_epochs=3) is expected


@pytest.mark.parametrize(
    ("natural", "adversarial", "first"),
    [(0, 0, Phase.MAIN), (0, 1, Phase.ADVERSARIAL), (1, 0, Phase.NATURAL)],
)
def test_a_phase_of_no_length_is_left_out(natural, adversarial, first):
    assert phase(0, natural, adversarial) is first


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (4.9, Phase.ADVERSARIAL),
        (5, Phase.CERTIFIED),
        (8.9, Phase.CERTIFIED),
        (9, Phase.MAIN),
    ],
)
def test_the_certified_loss_alone_comes_between_warm_up_and_main(t, expected):
    assert phase(t, 2, 3, certified_epochs=4) is expected


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_between_goes_straight_from_one_end_to_the_other(first, second, share, other):
    assert between((first, second), 0) == first
    assert between((first, second), 1) == pytest.approx(second)
    ends = sorted((first, second))
    assert ends[0] - 1e-12 <= between((first, second), share) <= ends[1] + 1e-12
    middle = between((first, second), (share + other) / 2)
    halves = [between((first, second), s) / 2 for s in (share, other)]
    assert middle == pytest.approx(sum(halves), abs=1e-12)


# --- All of them together


@pytest.mark.parametrize(
    ("t", "expected"),
    # Appendix A.5: T_nat 10, T_adv 40, R 50, T' 50, c_max 1e-4, lr / 4 at epochs 150 and 200.
    [
        (9.9, (Phase.NATURAL, 0.0, 1e-4, 5e-4)),
        (10, (Phase.ADVERSARIAL, 0.4, 1e-4, 5e-4)),
        (50, (Phase.MAIN, 0.0, 1e-4, 5e-4)),
        (62.5, (Phase.MAIN, 0.4 / 13, 1e-4, 5e-4)),
        (100, (Phase.MAIN, 0.4, 1e-4, 5e-4)),
        (125, (Phase.MAIN, 0.4, 0.5e-4, 5e-4)),
        (150, (Phase.MAIN, 0.4, 0.0, 1.25e-4)),
        (249, (Phase.MAIN, 0.4, 0.0, 3.125e-5)),
    ],
)
def test_the_schedules_of_the_papers_mnist_run_by_hand(t, expected):
    found = setting(recipes.load("mnist-dm-small"), t)
    assert found.stage == 0
    assert found.phase is expected[0]
    numbers = (found.epsilon, found.fosc_threshold, found.learning_rate)
    assert numbers == pytest.approx(expected[1:])


def test_the_authors_ramp_of_the_certified_loss_alone():
    authors = recipes.load("mnist-dm-small-0.3-advibp-authors")
    found = [setting(authors, t) for t in (49.9, 50, 62.5, 99.9, 100)]
    phases = [Phase.NATURAL, *[Phase.CERTIFIED] * 3, Phase.MAIN]
    assert [now.phase for now in found] == phases
    shares = [now.epsilon / 0.4 for now in found]
    # The line from (1/4, 1/13) to (1, 1) is at u = 49.9 / 50 a 500th of its time from its end.
    assert shares == pytest.approx([0, 0, 1 / 13, 1 - 0.002 * 16 / 13, 1])
    # Without it the same ε, and both losses from the start.
    both = setting(dataclasses.replace(authors, certified_epochs=0.0), 62.5)
    assert both == dataclasses.replace(found[2], phase=Phase.MAIN)


@pytest.mark.parametrize(
    ("t", "share"),
    # mnist-ibp: T_nat 10, R 50; a quarter of the ramp is 1/13 of ε, half of it 1/13 + 4/13.
    [(0, 0), (10, 0), (22.5, 1 / 13), (35, 5 / 13), (60, 1), (199, 1)],
)
def test_mixtures_follow_epsilon_along_the_ramp(t, share):
    config = dataclasses.replace(
        recipes.load("mnist-ibp"),
        natural_weight=(0.9, 0.3),
        crown_share=(1.0, 0.2),
        box_regularizers=0.5,
    )
    now = setting(config, t)
    assert now.epsilon == pytest.approx(0.4 * share)
    assert now.natural_weight == pytest.approx(0.9 - 0.6 * share)
    assert now.crown_share == pytest.approx(1.0 - 0.8 * share)
    assert now.box_regularizers == pytest.approx(0.5 * (1 - share))


@given(st.floats(0, 249.99), st.floats(0, 249.99))
def test_after_the_warm_up_epsilon_only_grows_and_the_rest_only_falls(s, t):
    config = dataclasses.replace(recipes.load("mnist-dm-small-short"), epochs=250)
    early, late = (setting(config, 1 + min(x, 249) * 1.0) for x in sorted((s, t)))
    assert early.epsilon <= late.epsilon <= config.epsilon
    for name in ("fosc_threshold", "learning_rate", "natural_weight", "crown_share"):
        assert getattr(early, name) >= getattr(late, name)
    assert config.box_regularizers >= early.box_regularizers >= late.box_regularizers >= 0


# --- Layer-wise stages


STAGES = dataclasses.replace(
    recipes.load("mnist-dm-small"),
    stages=2,
    stage_epochs=4,
    stage_milestones=(1, 3),
    natural_weight=(1, 0.25),
    crown_share=(1, 0.125),
    box_regularizers=0.5,
)


@pytest.mark.parametrize(
    ("since", "stage", "decays"),
    [(0, 1, 0), (0.9, 1, 0), (1, 1, 1), (3, 1, 2), (3.9, 1, 2), (4, 2, 0), (5, 2, 1), (7.9, 2, 2)],
)
def test_a_stage_is_at_full_strength_and_its_milestones_begin_anew(since, stage, decays):
    now = setting(STAGES, 250 + since)
    assert (now.stage, now.phase) == (stage, Phase.MAIN)
    assert (now.epsilon, now.fosc_threshold, now.box_regularizers) == (0.4, 0, 0)
    assert now.learning_rate == pytest.approx(1.25e-4 * 0.25**decays)
    assert (now.natural_weight, now.crown_share) == (0.25, 0.125)


@pytest.mark.parametrize(
    ("since", "t", "frozen"),
    [(40, 39.99, False), (40, 40, True), (40, 249, True), (40, 250, False), (math.inf, 249, False)],
)
def test_the_first_batch_norm_is_frozen_from_its_time_on_and_gone_in_stages(since, t, frozen):
    config = dataclasses.replace(STAGES, first_batch_norm_frozen_from=since)
    assert setting(config, t).first_batch_norm_frozen is frozen


def test_stages_leave_what_is_before_them_alone():
    without = dataclasses.replace(STAGES, stages=0)
    for t in (0, 30, 70, 120, 249.9):
        assert setting(STAGES, t) == setting(without, t)
        assert setting(STAGES, t).stage == 0


@given(st.integers(1, 4), st.integers(1, 7), st.floats(0, 1, exclude_max=True))
def test_every_stage_has_its_epochs(stages, stage_epochs, share):
    config = dataclasses.replace(STAGES, stages=stages, stage_epochs=stage_epochs)
    moments = [config.epochs + epoch + share / 2 for epoch in range(stages * stage_epochs)]
    counts = [setting(config, t).stage for t in moments]
    expected = [1 + index // stage_epochs for index in range(len(moments))]
    assert counts == expected
    assert config.total_epochs == config.epochs + len(moments)
