"""Whether a setting of the schedules is read in what remains of a run."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from robust_app import methods
from robust_app.config import Config
from robust_app.schedules import Phase, Setting, setting

SCHEDULED = (
    "epsilon",
    "learning_rate",
    "learning_rate_factor",
    "milestones",
    "ramp_epochs",
    "certified_epochs",
    "first_batch_norm_frozen_from",
    "fosc_maximum",
    "fosc_decay_epochs",
    "natural_weight",
    "crown_share",
    "box_regularizers",
    "stage_learning_rate",
    "stage_milestones",
)
"""What :func:`robust_app.schedules.setting` reads, but the lengths of a run and its warm-up."""


def same_from(one: Config, other: Config, t: float) -> bool:
    """Whether two runs that differ in one of these settings have the same schedules from t on.

    Between two neighbouring times of :func:`_turns` two schedules that differ in one setting are
    the same, or meet in one moment at most: two moments tell.

    Args:
        one: of any method.
        other: of the same, as long and with the same warm-up.
        t: epochs from the start of the run, before its end.

    >>> from robust_app import recipes
    >>> from robust_app.overrides import override
    >>> recipe = recipes.load("digits-ibp")  # its ramp ends at 17
    >>> longer = override(recipe, ["ramp_epochs=18"])
    >>> same_from(recipe, longer, t=16), same_from(recipe, longer, t=20)
    (False, True)
    """
    turns = {*_turns(one, t), *_turns(other, t)}
    times = sorted({t, one.total_epochs, *(turn for turn in turns if t < turn < one.total_epochs)})
    moments = (
        start + (stop - start) * share
        for start, stop in pairwise(times)
        for share in (1 / 3, 2 / 3)
    )
    return all(_read(one, moment) == _read(other, moment) for moment in moments)


def _read(config: Config, t: float) -> Setting:
    """The schedules at t, 0 where neither a loss nor an oracle reads them."""
    now, method = setting(config, t), methods.find(config.method)
    losses = methods.losses_of(method, now.phase)
    boxes = "certified" in losses or "mixed" in losses
    read = {
        "epsilon": losses != ("natural",),
        "fosc_threshold": now.phase is Phase.MAIN and method.rule is methods.paper_rule,
        "natural_weight": "mixed" in losses,
        "crown_share": boxes and method.crown,
        "box_regularizers": boxes,
    }
    unread: dict[str, Any] = {name: 0.0 for name, so in read.items() if not so}
    return replace(now, **unread)


def _turns(config: Config, t: float) -> Iterator[float]:
    """The times at which one of the schedules begins, jumps or ends.

    Of stages those of the one in progress, or the first, and of the next: the others are as that.
    """
    warm_up = config.natural_epochs + config.adversarial_epochs
    ramp_end = warm_up + config.ramp_epochs
    yield from (config.natural_epochs, warm_up, warm_up + config.certified_epochs)
    yield from (ramp_end, ramp_end + config.fosc_decay_epochs)
    yield from (config.first_batch_norm_frozen_from, *config.milestones)
    before = int(max(0, t - config.epochs) // config.stage_epochs)
    for stage in (before, before + 1):
        start = config.stage_end(stage)
        yield from (start, *(start + milestone for milestone in config.stage_milestones))
