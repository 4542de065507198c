"""The command ``robust-app fork``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from robust_app import distributed, forking, overrides, reporting
from robust_app.errors import UserError
from robust_app.run_directory import RunDirectory, next_free
from robust_app.schedules import setting


def fork(
    parent: Annotated[
        Path,
        typer.Argument(metavar="RUN_DIR", help="Of a run; the fork begins after its last epoch."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="What is other from there on; may be repeated."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the fork is kept; runs/NAME-fork-N by default.")
    ] = None,
) -> None:
    """Begin a run with the epochs that another has done, and other settings from there on.

    The other run is only read. What begins is trained by `train --resume`.
    """
    if distributed.rank() > 0:
        return  # one of torchrun's processes does it
    child = RunDirectory(run_dir or next_free(Path("runs"), f"{parent.resolve().name}-fork"))
    child.check_free()
    if parent.resolve() in child.path.resolve().parents:
        raise UserError(f"{child.path}: lies in the run that is forked; choose another folder")
    planned = forking.plan(RunDirectory(parent), settings or [])
    with child.locked():
        forking.write(planned, child)
    config, done, scale = planned.config, planned.done, planned.learning_rate_scale
    changed = overrides.differences(config, planned.parent) or "nothing changed"
    after = setting(config, done)
    by_schedule = "" if scale == 1 else f", {scale:g} of its schedule's"
    lines = [
        f"run directory: {child.path}",
        f"forked after epoch {done} of {parent} ({changed})",
        f"epoch {done + 1} begins with ε {after.epsilon:.4f} and a learning rate of "
        f"{after.learning_rate * scale:g}{by_schedule}",
        f"continue with: robust-app train --run-dir {shlex.quote(str(child.path))} --resume",
    ]
    for line in lines:
        reporting.say(reporting.console(), line)
