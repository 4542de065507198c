"""A run as its user watches it train."""

from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from robust_app import (
    curves,
    divergence,
    environment,
    methods,
    pictures,
    reporting,
    session,
)
from robust_app.errors import UserError
from robust_app.events import Events
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from robust_app.watching import Watcher, Watchers

REMEMBERED = ("data_root", "on_divergence")  # from start to start


def train(
    trainer: Trainer,
    directory: RunDirectory,
    console: Console,
    *,
    data_root: Path | None,
    stop_after: int,
    tensorboard: bool = False,
    on_divergence: str = divergence.STOP,
) -> None:
    """Begin or resume a run, watched where this process leads, and draw its curves.

    They are drawn on an interruption too, if an epoch is done.

    Args:
        trainer: freshly made.
        directory: locked by the leading process; begun here if it holds no run.
        console: of the leading process.
        data_root: where the data lie, noted for the next time.
        stop_after: number of epochs, counted from the start of the run.
        tensorboard: whether to write events for it too.
        on_divergence: see :func:`robust_app.session.run`.

    Raises:
        UserError: the directory holds another run; see also :func:`robust_app.session.run`.
    """
    world, config = trainer.world, trainer.config
    is_done = session.has_trained(directory, stop_after)  # by all: of damaged files each can tell
    if not world.leads:
        session.run(trainer, directory, reporting.Silent(), stop_after, on_divergence)
        return
    made_with = environment.describe(world.device, world.size, config.seed, data_root)
    made_with |= {"execution": trainer.execution.name, "on_divergence": on_divergence}
    made_with |= {"data": trainer.dataset.checksum}
    if not directory.config_file.exists():
        directory.start(config)
    elif directory.config() != config:  # begun since this process looked, before it had the lock
        raise UserError(f"{directory.path}: holds another run")
    reporting.say(console, f"run directory: {directory.path}")
    has_radius = methods.find(config.method).has_radius
    if has_radius and config.epsilon != config.evaluation_epsilon and not is_done:
        reporting.say(
            console,
            f"trained at ε = {config.epsilon:g}, evaluated at {config.evaluation_epsilon:g} "
            "(evaluation_epsilon)",
        )
    _note_start(directory, made_with, console, is_done)
    try:
        with ExitStack() as stack:
            watchers: list[Watcher] = [
                stack.enter_context(reporting.watcher(console, config.total_epochs))
            ]
            if tensorboard:
                watchers.append(stack.enter_context(closing(Events(directory))))
            session.run(trainer, directory, Watchers(watchers), stop_after, on_divergence)
    except KeyboardInterrupt:
        with suppress(Exception):  # the interruption is what is to be told
            _draw(directory)
        raise
    _draw(directory)


def _note_start(
    directory: RunDirectory, made_with: dict[str, Any], console: Console, is_done: bool
) -> None:
    """Keep what a start of the run is made with, and tell where that differs from the last one.

    Of one that finds nothing to train, only what the next one is to know is new.
    """
    last = directory.last_environment()
    if is_done and last:
        if any(last.get(name, made_with[name]) != made_with[name] for name in REMEMBERED):
            told = {name: made_with[name] for name in ("command", *REMEMBERED)}
            directory.add_environment(last | told)
        return
    directory.add_environment(made_with)
    changed = list(environment.differences(last, made_with))
    if changed:
        reporting.say(
            console,
            f"resumed where it may end with other bits than unbroken ({'; '.join(changed)})",
        )


def _draw(directory: RunDirectory) -> None:
    metrics = directory.metrics()
    if metrics:
        figure = curves.figure({directory.path.resolve().name: metrics})
        pictures.save(figure, [directory.curves_file])
