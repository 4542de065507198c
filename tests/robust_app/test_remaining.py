"""What remains of a run with another setting of its schedules."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from robust_app import methods, recipes
from robust_app.config import Config
from robust_app.remaining import SCHEDULED, same_from
from robust_app.schedules import Phase, setting
from tests.robust_app.test_steps import losses_of, small_batch, small_network

RUN = dataclasses.replace(
    recipes.load("mnist-dm-small-short"),
    **{"natural_epochs": 1.0, "adversarial_epochs": 1.5, "ramp_epochs": 1.0},
    **{"fosc_decay_epochs": 10.75, "certified_epochs": 9.0, "first_batch_norm_frozen_from": 13.0},
    **{"natural_weight": (1.0, 0.5), "epochs": 20, "milestones": (16.0,)},
    **{"stages": 4, "stage_epochs": 5, "stage_milestones": (2.0,)},
)
LENGTHS = {"epochs", "natural_epochs", "adversarial_epochs", "stages", "stage_epochs"}
OTHER = {float: 0.75, int: 15, bool: True, str: "other", tuple: (0.25, 0.75)}
SPECIAL = {"precision": "bf16", "first_batch_norm_frozen_from": 2.0, "stages": 0}
TIMES = (
    *("ramp_epochs", "fosc_decay_epochs", "certified_epochs", "first_batch_norm_frozen_from"),
    *("milestones", "stage_milestones"),
)
VALUES = (
    *({"milestones": ()}, {"stage_milestones": ()}, {"learning_rate_factor": 0.5}),
    *({"epsilon": 0.2}, {"natural_weight": (0.0, 1.0)}, {"box_regularizers": 2.0}),
)


def changes(config: Config) -> Iterator[dict[str, Any]]:
    """Each time up to half an epoch sooner or later, and other values."""
    for name, quarters in itertools.product(TIMES, range(-2, 3)):
        was, by = getattr(config, name), quarters / 4
        yield {name: tuple(t + by for t in was) if isinstance(was, tuple) else was + by}
    yield from VALUES


def moments() -> list[float]:
    """The middles of the eighths of all epochs, at none of which anything changes."""
    return [(index + 0.5) / 8 for index in range(8 * RUN.total_epochs)]


@pytest.mark.parametrize("method", ["advibp", "weighted-sum"])
@pytest.mark.parametrize("beside", [{}, {"fosc_maximum": 0.0}, {"fosc_decay_epochs": 3.0}])
def test_it_is_the_same_if_it_is_at_every_moment(method, beside):
    def read(config: Config, moment: float) -> object:
        now = setting(config, moment)
        unread = {"natural_weight", "crown_share"}
        if now.phase in (Phase.NATURAL, Phase.ADVERSARIAL):
            unread.add("box_regularizers")
        if method != "advibp" or now.phase is not Phase.MAIN:
            unread.add("fosc_threshold")
        return {k: v for k, v in dataclasses.asdict(now).items() if k not in unread}

    one = dataclasses.replace(RUN, method=method, **beside)
    for change in changes(one):
        other = dataclasses.replace(one, **change)
        differ = [t for t in moments() if read(one, t) != read(other, t)]
        for t in range(RUN.total_epochs):
            assert same_from(one, other, t) == (not differ or max(differ) < t), (change, t)


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
    asking = set()
    for name in methods.METHODS:
        one = dataclasses.replace(RUN, method=name)
        if not same_from(one, dataclasses.replace(one, fosc_maximum=0.5), 12):
            asking.add(name)
    assert asking == {"advibp", "advcrown-ibp"}


class Spy:
    """Shares of which it is noted who is asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> float:
        self.asked.add(name)
        return 0.5


@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.value)
@pytest.mark.parametrize("name", list(methods.METHODS))
def test_what_the_losses_read_counts_and_nothing_else(name, phase):
    method, spy = methods.METHODS[name], Spy()
    losses, of = losses_of(small_network(), name), methods.losses_of(method, phase)
    values = [
        torch.stack([loss.detach() for loss in losses.of(of, small_batch(epsilon), spy)])
        for epsilon in (0.1, 0.2)
    ]
    asked = spy.asked | ({"epsilon"} if not torch.equal(*values) else set())
    whole = {"natural": "natural_epochs", "adversarial": "adversarial_epochs"}
    length = whole.get(phase.value, "certified_epochs" if phase is Phase.CERTIFIED else "")
    lengths = dict.fromkeys(("natural_epochs", "adversarial_epochs", "certified_epochs"), 0.0)
    # The ramp goes on throughout, but in a warm-up.
    ramp = 0.0 if phase.value in whole else 20.0
    one = dataclasses.replace(
        RUN, method=name, stages=0, ramp_epochs=ramp, **lengths | ({length: 20.0} if length else {})
    )
    others = {
        "epsilon": 0.2,
        "natural_weight": (0.75, 0.25),
        "crown_share": (0.75, 0.25),
        "box_regularizers": 2.0,
    }
    counting = {
        setting
        for setting, value in others.items()
        if not same_from(one, dataclasses.replace(one, **{setting: value}), 0)
    }
    assert counting == asked


def test_a_run_may_end_with_its_warm_up():
    alone = dataclasses.replace(
        recipes.load("digits-fgsm"),
        **{"epochs": 20, "natural_epochs": 19.0, "adversarial_epochs": 1.0, "ramp_epochs": 0.0},
        **{"milestones": (), "fosc_decay_epochs": 0.0},
    )
    assert not same_from(alone, dataclasses.replace(alone, epsilon=0.05), 0)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_what_the_schedules_read_is_listed(name):
    value = SPECIAL.get(name, OTHER[type(getattr(RUN, name))])
    changed = dataclasses.replace(RUN, **{name: value})
    read = any(setting(RUN, moment) != setting(changed, moment) for moment in moments())
    assert read == (name in SCHEDULED or name in LENGTHS)
