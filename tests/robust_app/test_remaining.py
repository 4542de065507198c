"""What remains of a run with another setting of its schedules."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_app import methods, recipes
from robust_app.config import Config
from robust_app.remaining import SCHEDULED, same_from
from robust_app.schedules import Phase, setting

RUN = dataclasses.replace(
    recipes.load("mnist-dm-small-short"),
    **{"natural_epochs": 1.0, "adversarial_epochs": 1.5, "ramp_epochs": 1.0},
    **{"fosc_decay_epochs": 11.0, "certified_epochs": 9.0, "first_batch_norm_frozen_from": 13.0},
    **{"natural_weight": (1.0, 0.5), "epochs": 20, "milestones": (16.0,)},
    **{"stages": 4, "stage_epochs": 5, "stage_milestones": (2.0,)},
)
LENGTHS = {"epochs", "natural_epochs", "adversarial_epochs", "stages", "stage_epochs"}
OTHER = {float: 0.75, int: 15, bool: True, str: "other", tuple: (0.25, 0.75)}
SPECIAL = {"precision": "bf16", "first_batch_norm_frozen_from": 2.0, "stages": 0}
TIMES = ["ramp_epochs", "fosc_decay_epochs", "certified_epochs", "first_batch_norm_frozen_from"]
CHANGES = st.one_of(
    st.builds(
        lambda name, quarters: {name: getattr(RUN, name) + quarters / 4},
        st.sampled_from(TIMES),
        st.integers(-2, 2),
    ),
    st.builds(
        lambda name, quarters: {name: tuple(t + quarters / 4 for t in getattr(RUN, name))},
        st.sampled_from(["milestones", "stage_milestones"]),
        st.integers(-2, 2),
    ),
    st.sampled_from([{"milestones": ()}, {"stage_milestones": ()}, {"natural_weight": (0.0, 1.0)}]),
    st.sampled_from([{"epsilon": 0.2}, {"learning_rate_factor": 0.5}, {"box_regularizers": 2.0}]),
)


def moments(t: float) -> list[float]:
    """The middles of the eighths of the epochs from t on, at none of which anything changes."""
    return [t + (index + 0.5) / 8 for index in range(8 * (RUN.total_epochs - t))]


@settings(max_examples=400)
@given(
    CHANGES,
    st.fixed_dictionaries({"fosc_maximum": st.sampled_from([0.0, 1.0])}),
    st.sampled_from(["advibp", "weighted-sum"]),
    st.integers(0, RUN.total_epochs - 1),
)
def test_it_is_the_same_if_it_is_at_every_moment(change, beside, method, t):
    one = dataclasses.replace(RUN, method=method, **beside)
    other = dataclasses.replace(one, **change)

    def read(config: Config, moment: float) -> object:
        now = setting(config, moment)
        oracle = method == "advibp" and now.phase is Phase.MAIN
        return now if oracle else dataclasses.replace(now, fosc_threshold=0.0)

    agree = all(read(one, moment) == read(other, moment) for moment in moments(t))
    assert same_from(one, other, t) == agree


def test_two_that_meet_are_not_the_same():
    """They do at a third of what remains, where the first moment is looked at."""
    ramp = dataclasses.replace(
        recipes.load("digits-ibp"),
        **{"epochs": 4, "natural_epochs": 0.0, "ramp_epochs": 4.0, "milestones": ()},
        **{"crown_share": (0.0, 0.0), "fosc_maximum": 0.0, "natural_weight": (1.0, 0.0)},
    )
    t = 1.0
    meeting = setting(ramp, t + (ramp.epochs - t) / 3).natural_weight
    level = dataclasses.replace(ramp, natural_weight=(meeting, meeting))
    assert setting(level, 2.0).natural_weight == setting(ramp, 2.0).natural_weight
    assert not same_from(ramp, level, t)


def test_only_the_papers_rule_asks_an_oracle():
    for name in methods.METHODS:
        one = dataclasses.replace(RUN, method=name)
        other = dataclasses.replace(one, fosc_maximum=0.5)
        assert same_from(one, other, 12) == (methods.find(name).rule is not methods.paper_rule)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_what_the_schedules_read_is_listed(name):
    value = SPECIAL.get(name, OTHER[type(getattr(RUN, name))])
    changed = dataclasses.replace(RUN, **{name: value})
    read = any(setting(RUN, moment) != setting(changed, moment) for moment in moments(0))
    assert read == (name in SCHEDULED or name in LENGTHS)
