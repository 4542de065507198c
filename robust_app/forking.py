"""A run that goes on from where another is, with other settings from there on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from robust_app import (
    checkpoint,
    loading,
    method_settings,
    methods,
    overrides,
    remaining,
    training_state,
)
from robust_app.config import Config, as_set
from robust_app.errors import SettingError, UserError, one_line
from robust_app.run_directory import RunDirectory
from robust_app.schedules import setting

FIXED = {
    "dataset": "the network was trained on it",
    "model": "the checkpoint is of it",
    "batch_norm": "the checkpoint is of a network with or without it",
    "ibp_initialization": "the network is trained already",
    "seed": "it draws the held-out images",
    "held_out": "other images would be held out",
    "evaluation_epsilon": "held-out errors are at that radius",
    "natural_epochs": "all schedules count from their end",
    "adversarial_epochs": "all schedules count from their end",
    "reference_fan_in": "the optimizer's groups are made by it",
}
"""Settings that a fork has of its parent, and why."""
OF_MOMENTS = {
    "authors_weights": "the optimizer's moments are of the parameters that it names",
    "moment_decay": "the optimizer's moments are kept by it",
}
"""The same, where the next epoch goes on with moments of two losses."""
OF_STAGES = dict.fromkeys(("epochs", "stage_epochs"), "a layer-wise stage has begun")
"""The same, of a parent that has begun one."""


@dataclass(frozen=True)
class Fork:
    """A run that has yet to be written.

    Attributes:
        config: its own.
        parent: the configuration of the run that it comes from.
        checkpoint: of that run, after ``done`` epochs.
        metrics, environments, divergences, origin: as in the files of these names.
        learning_rate_scale: what the schedule's learning rate has come down to by divergences.
    """

    config: Config
    parent: Config
    checkpoint: dict[str, Any]
    done: int
    learning_rate_scale: float
    metrics: list[dict[str, Any]]
    environments: list[dict[str, Any]]
    divergences: list[dict[str, Any]]
    origin: list[dict[str, Any]]


def plan(parent: RunDirectory, settings: Sequence[str]) -> Fork:
    """Read what a fork takes over, and see that it can go on from there with its settings.

    Args:
        parent: of any run that has a checkpoint. It may be training: it is only read.
        settings: what to change, see :func:`robust_app.overrides.override`.

    Raises:
        UserError: a setting is refused, or a file is missing or damaged.
    """
    stored, path = parent.config(), parent.checkpoint_file
    state = checkpoint.load(path)  # before the metrics, which are written first
    loading.check_config(state, stored, path)
    try:
        done = training_state.epochs_done(state, stored.total_epochs)
        scale = training_state.learning_rate_scale(state)
        has_moments = training_state.has_moments(state)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error
    metrics = [line | {"taken_over": True} for line in parent.metrics()[:done]]
    if len(metrics) < done:
        raise UserError(f"{parent.metrics_file}: expected {done} epochs, found {len(metrics)}")
    config = overrides.override(stored, settings)
    # A stage begins with an optimizer of its own.
    weighed = has_moments and setting(config, done).stage == setting(config, done - 1).stage
    _check(stored, config, done, weighed)
    if not weighed:
        state = training_state.without_moments(state, config.moment_decay)
    # Of a parent that is about to go back, the last one is noted before the checkpoint has it.
    divergences = [line for line in parent.divergences() if line["learning_rate_scale"] >= scale]
    made = {"config": stored.to_toml(), "command": sys.argv}
    return Fork(
        config=config,
        parent=stored,
        checkpoint=state | loading.content(config),
        done=done,
        learning_rate_scale=scale,
        metrics=metrics,
        environments=parent.environments(),
        divergences=divergences,
        origin=[*parent.origin(), {"run": str(parent.path.resolve()), "epochs": done} | made],
    )


def write(fork: Fork, child: RunDirectory) -> None:
    """Begin a planned run.

    Args:
        fork: from :func:`plan`.
        child: locked by this process.

    Raises:
        UserError: if the folder holds anything or cannot be written.
    """
    child.check_free()
    checkpoint.save(fork.checkpoint, child.checkpoint_file)
    child.write_metrics(fork.metrics)
    for made_with in fork.environments:
        child.add_environment(made_with)
    for divergence in fork.divergences:
        child.add_divergence(divergence["where"], divergence["learning_rate_scale"])
    child.write_origin(fork.origin)
    child.write_config(fork.config)  # last: one that is broken off before is no run


def _check(stored: Config, config: Config, done: int, weighed: bool) -> None:
    """See that a run can go on with another configuration after so many epochs.

    Args:
        stored: of the run that is forked.
        config: of the fork.
        done: epochs.
        weighed: whether the next epoch goes on with moments of two losses.
    """
    fixed = FIXED | (OF_MOMENTS if weighed else {}) | (OF_STAGES if done > stored.epochs else {})
    for name, why in fixed.items():
        was, now = getattr(stored, name), getattr(config, name)
        if was != now:
            fault = f"a fork keeps its parent's, {as_set(was)}: {why}; found {as_set(now)}"
            raise SettingError(name, fault)
    more = "epochs" if done <= stored.epochs else "stages"
    if config.total_epochs <= done or (more == "epochs" and config.epochs < done):
        raise SettingError(
            more,
            f"expected enough for more than the {done} epochs that are done, found "
            f"{getattr(config, more)} (a fork begins after a run's last epoch: give it more "
            f"{more}, or fork a run that is paused before)",
        )
    try:
        method_settings.check(config)
    except SettingError as error:
        if error.setting in fixed:
            raise UserError(f"{error}, which a fork cannot change") from None
        raise
    method_settings.check_changes(stored, config)
    was, now = (", ".join(methods.verifiers_of(each)) for each in (stored, config))
    if was != now:
        name = "crown_share" if stored.method == config.method else "method"
        raise SettingError(
            name,
            f"a fork keeps what verifies the held-out images, {was}: their errors so far "
            f"are by it; found {now}",
        )
    for name in remaining.SCHEDULED:
        if _changed_in_vain(name, stored, config, done):
            was, now = as_set(getattr(stored, name)), as_set(getattr(config, name))
            raise SettingError(
                name,
                f"expected its parent's, {was}, or what changes the epochs after the {done} that "
                f"are done, with whatever else is set; found {now}",
            )


def _changed_in_vain(name: str, stored: Config, config: Config, done: int) -> bool:
    """Whether a setting is not the parent's, though with the parent's all would go on alike."""
    try:
        kept = replace(config, **{name: getattr(stored, name)})
        method_settings.check_changes(stored, kept)
    except UserError:
        return False  # what else was set asks for another
    return kept != config and remaining.same_from(kept, config, done)
