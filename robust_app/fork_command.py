"""The command ``robust-app fork``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from robust_app import forking, overrides, reporting, session
from robust_app.run_directory import RunDirectory, next_free


def fork(
    parent: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Of a run with a checkpoint.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What is other from here on."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the fork is kept; runs/NAME-fork-N by default.")
    ] = None,
) -> None:
    """Begin a run with the epochs that another has done, and other settings from there on.

    The other run is only read. What begins is trained by `train --resume`.
    """
    child = RunDirectory(run_dir or next_free(Path("runs"), f"{parent.resolve().name}-fork"))
    child.check_free()
    planned = forking.plan(RunDirectory(parent), settings or [])
    with child.locked():
        forking.write(planned, child)
    changed = overrides.differences(planned.config, planned.parent) or "nothing changed"
    lines = [
        f"run directory: {child.path}",
        f"forked after epoch {planned.done} of {parent} ({changed})",
        session.lost_best(child),
        planned.learning_rate_scale < 1
        and f"the learning rate stays at {planned.learning_rate_scale:g} of its schedule's",
        f"continue with: robust-app train --run-dir {shlex.quote(str(child.path))} --resume",
    ]
    for line in filter(None, lines):
        reporting.console().print(line, highlight=False, markup=False, soft_wrap=True)
