"""A run that goes on from where another is, with other settings from there on."""

import sys
from collections.abc import Sequence
from pathlib import Path

from robust_app import checkpoint, method_settings, overrides, session, training_state
from robust_app.config import Config
from robust_app.errors import UserError, one_line
from robust_app.run_directory import RunDirectory

FIXED = {
    **dict.fromkeys(("dataset", "model", "batch_norm"), "the checkpoint is of it"),
    "ibp_initialization": "the network is trained already",
    **dict.fromkeys(("seed", "held_out"), "it chooses the images that are held out"),
    "evaluation_epsilon": "the held-out errors so far are at that radius",
}
"""Settings that a fork has of its parent, and why."""
BEGUN = dict.fromkeys(("epochs", "stages", "stage_epochs"), "a layer-wise stage has begun")
"""The same, of a parent that has."""


def fork(parent: RunDirectory, child: RunDirectory, settings: Sequence[str]) -> tuple[Config, int]:
    """Begin a run with the epochs that another has done and other settings.

    The child has the parent's metrics, and its best network as long as no epoch of its own is
    better. The parent, which may be training, is only read.

    Args:
        parent: of any run that has a checkpoint.
        child: free, and locked by this process.
        settings: what to change, see :func:`robust_app.overrides.override`.

    Returns:
        The child's configuration and the number of epochs that are done.

    Raises:
        UserError: a setting is refused, a file of the parent is missing or damaged, or the child
            cannot be written or is not free.
    """
    child.check_free()
    stored = parent.config()
    config = overrides.override(stored, settings)
    state = _made_with(stored, parent.checkpoint_file)
    try:
        done = training_state.epochs_done(state, stored.total_epochs)
    except (LookupError, ValueError) as error:
        raise UserError(f"{parent.checkpoint_file}: damaged ({one_line(error)})") from error
    for name, why in (FIXED | (BEGUN if done > stored.epochs else {})).items():
        was, now = getattr(stored, name), getattr(config, name)
        if was != now:
            raise UserError(f"{name}: a fork keeps its parent's, {was!r}: {why}; found {now!r}")
    if done >= config.total_epochs:
        raise UserError(
            f"epochs: expected more than the {done} that are done, found {config.total_epochs}"
        )
    method_settings.check_changes(stored, config)
    method_settings.check(config)
    metrics, environments = parent.metrics()[:done], parent.environments()
    if len(metrics) < done:
        raise UserError(f"{parent.metrics_file}: expected {done} epochs, found {len(metrics)}")
    if not environments:
        raise UserError(f"{parent.environment_file}: missing")
    label = session.content(config)
    checkpoint.save(state | label, child.checkpoint_file)
    for file, epoch in (
        (parent.best_file, session.best_epoch(metrics)),
        (parent.last_file, done),
    ):
        if file.exists() and (network := _made_with(stored, file)).get("epoch") == epoch:
            checkpoint.save(network | label, child.path / file.name)
    child.write_metrics(metrics)
    for divergence in parent.divergences():
        child.add_divergence(divergence["where"], divergence["learning_rate_scale"])
    origin = {"run": str(parent.path.resolve()), "epochs": done, "config": stored.to_toml()}
    forked = environments[-1] | {"command": sys.argv, "forked_from": origin}
    for made_with in (*environments, forked):
        child.add_environment(made_with)
    child.write_config(config)  # last: one that is broken off before is no run
    return config, done


def _made_with(config: Config, file: Path) -> dict[str, object]:
    content = checkpoint.load(file)
    session.check_config(content, config, file)
    return content
