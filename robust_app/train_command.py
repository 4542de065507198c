"""The command ``robust-app train``."""

import dataclasses
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust_app import (
    data,
    distributed,
    divergence,
    evaluating,
    forking,
    loading,
    method_settings,
    overrides,
    recipes,
    reporting,
    runner,
    session,
)
from robust_app.capture import EXECUTIONS
from robust_app.config import Config
from robust_app.distributed import ProcessLost
from robust_app.errors import UserError, one_line, unknown
from robust_app.events import summary_writer
from robust_app.examination import Examination
from robust_app.interruption import Terminated
from robust_app.options import DataRoot, Device, Download
from robust_app.run_directory import RunDirectory, next_free
from robust_app.training import Trainer


def train(
    recipe: Annotated[
        str | None, typer.Option(help="Name from `robust-app recipes`, or a .toml file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Length of the run; the recipe's whole schedule is scaled to it."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Overrides the recipe's.")] = None,
    data_root: DataRoot = None,
    download: Download = False,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run is kept; runs/RECIPE-N by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --run-dir.")
    ] = False,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Pause after this epoch, to be resumed later.")
    ] = None,
    device: Device = "auto",
    execution: Annotated[
        str,
        typer.Option(
            help="How a step is run: eager; graph, captured on a GPU once and replayed; or "
            "compile, its losses by torch.compile. A resumed run may change it."
        ),
    ] = "eager",
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write scalars for it, also when resumed."),
    ] = False,
    on_divergence: Annotated[
        str | None,
        typer.Option(
            help="stop, by default; or lower-lr, go back to the last checkpoint with half the "
            "learning rate, at most five times. A resumed run does as before."
        ),
    ] = None,
) -> None:
    """Train a network; with no options, AdvIBP on the embedded digits in about a minute."""
    if execution not in EXECUTIONS:
        raise unknown("--execution", execution, EXECUTIONS)
    if resume and run_dir is None:
        raise UserError("--resume: say which run with --run-dir")
    if distributed.will_restart() and run_dir is None:
        raise UserError("--run-dir: needed with --max-restarts, to find the run again")
    if run_dir is None:
        begun = _requested(None, recipe, settings or [], epochs, seed)
        run_dir = next_free(Path("runs"), _name(recipe, begun))
    directory = RunDirectory(run_dir)
    resume = resume or (distributed.restarted() and directory.config_file.exists())
    tensorboard = tensorboard or (resume and directory.events_folder.is_dir())
    if tensorboard:
        summary_writer()  # what is missing is missed before anything is written
    stored = directory.config() if resume else None
    if stored is None:
        directory.check_free()
    config = _requested(stored, recipe, settings or [], epochs, seed)
    if stored is not None and config != stored:
        raise UserError(
            f"--resume: the run has {overrides.differences(stored, config)}; leave out what makes "
            f"it another, or {_instead(directory, stored, config, epochs)}"
        )
    until = min(stop_after or config.total_epochs, config.total_epochs)
    data_root = data_root or directory.data_root()
    on_divergence = on_divergence or directory.on_divergence() or divergence.STOP
    if on_divergence not in divergence.CHOICES:  # what a run has noted is from a file
        raise unknown("--on-divergence", str(on_divergence), divergence.CHOICES)
    with _saying_how_to_continue(directory), distributed.join(device) as world:
        with world.leader_first():
            dataset = loading.load_data(directory, config, data_root, download, world.device)
        data.check_trainable(dataset)
        trainer = Trainer(config, dataset, world, EXECUTIONS[execution])
        console = reporting.console()
        with directory.locked() if world.leads else nullcontext():
            runner.train(
                trainer,
                directory,
                console,
                data_root=data_root,
                stop_after=until,
                tensorboard=tensorboard,
                on_divergence=on_divergence,
            )
            if world.leads:
                _report(trainer, directory, console)


def _report(trainer: Trainer, directory: RunDirectory, console: Console) -> None:
    """Evaluate a run that is at its end, or say why not."""
    if trainer.epochs_done < trainer.config.total_epochs:
        reporting.say(console, f"paused after epoch {trainer.epochs_done}; {_again(directory)}")
        return
    how = Examination.of(trainer.config)
    if session.evaluated(directory, how):
        reporting.say(console, f"done before; its errors are in {directory.results_file}")
        return
    evaluating.evaluate(directory, trainer.dataset, console, how, trainer.config.seed)


@contextmanager
def _saying_how_to_continue(directory: RunDirectory) -> Iterator[None]:
    """Tell the user how, if the run is broken off from outside."""
    kept = f"all whole epochs are kept, {_again(directory)}"
    try:
        yield
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        # Ctrl-C reaches all processes. SIGTERM may come because the leading one has died.
        if directory.config_file.exists() and (terminated or distributed.rank() == 0):
            line = f"{'terminated' if terminated else 'interrupted'}; {kept}"
            reporting.say(reporting.console(), line)
        raise
    except ProcessLost as error:
        if not directory.config_file.exists():
            raise
        raise ProcessLost(f"{error}; {kept}") from error


def _instead(directory: RunDirectory, stored: Config, config: Config, epochs: int | None) -> str:
    """What to do for a configuration that a run cannot be resumed with."""
    path = shlex.quote(str(directory.path))
    if epochs is not None and config == overrides.with_epochs(stored, epochs):
        with suppress(UserError):
            forking.plan(directory, [f"epochs={epochs}"])
            return (
                "begin one where this is, with the rest of its schedule as it is: "
                f"robust-app fork {path} --set epochs={epochs}"
            )
    if any(getattr(stored, name) != getattr(config, name) for name in forking.FIXED):
        return "train another run from its start: no fork may differ in that either"
    return (
        "begin one where this is, as far as a fork may differ: "
        f"robust-app fork {path} --set KEY=VALUE"
    )


def _again(directory: RunDirectory) -> str:
    program = "torchrun … -m robust_app" if os.environ.get("WORLD_SIZE") else "robust-app"
    path = shlex.quote(str(directory.path))
    return f"continue with: {program} train --run-dir {path} --resume"


def _name(recipe: str | None, config: Config) -> str:
    """Of a run's folder: its recipe's, or without one that of the data."""
    kind, _, path = config.dataset.partition(":")
    return Path(recipe or path or kind).stem or "run"


def _requested(
    stored: Config | None,
    recipe: str | None,
    settings: list[str],
    epochs: int | None,
    seed: int | None,
) -> Config:
    """The configuration that the options describe, on top of a stored one if no recipe is named."""
    config = stored if recipe is None else None
    config = config or recipes.load("digits" if recipe is None else recipe)
    for name, value in (("epochs", epochs), ("seed", seed)):
        if value is not None and any(text.partition("=")[0].strip() == name for text in settings):
            raise UserError(f"--{name}: give it or --set {name}, not both")
    if epochs is not None:
        config = overrides.with_epochs(config, epochs)
    if seed is not None:
        settings = [f"seed={seed}", *settings]
    recipes_own, config = config, overrides.override(config, settings)
    if stored is None:
        method_settings.check_changes(recipes_own, config)
    kind, colon, path = config.dataset.partition(":")
    if not colon:
        return config
    try:  # The run must find its data again from another folder.
        found = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"dataset: {config.dataset}: no such path ({one_line(error)})") from error
    return dataclasses.replace(config, dataset=f"{kind}:{found}")
