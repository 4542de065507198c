"""The command line: its commands, and the status that it ends with."""

import io
import json
import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import mogd
from robust_app import distributed, listings, reporting
from robust_app import recipes as recipe_book
from robust_app.distributed import OfOneProcess
from robust_app.errors import UserError, reason, shown
from robust_app.evaluate_command import evaluate
from robust_app.exchange.command import export
from robust_app.fork_command import fork
from robust_app.freed_memory import keep_freed_memory
from robust_app.interruption import stoppable
from robust_app.plot import plot
from robust_app.programming import is_solving
from robust_app.reproduction.command import reproduce
from robust_app.train_command import train
from robust_app.verify_command import verify

# Typer has no public name for the class of all usage errors, two above BadParameter.
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Train and evaluate image classifiers with certified ℓ∞ robustness.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        _say(f"robust-app {mogd.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _general(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the versions and exit."
        ),
    ] = False,
) -> None:
    """What comes before a command."""


app.command()(train)
app.command()(fork)
app.command()(evaluate)
app.command()(export)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A recipe to print, as a file for `train --recipe`.")
    ] = None,
) -> None:
    """List the recipes that `train --recipe` takes, or print one."""
    if name is None:
        _show(listings.of_recipes())
    else:
        if description := recipe_book.description(name):
            _say(f"description = {json.dumps(description, ensure_ascii=False)}")
        _say(recipe_book.load(name).to_toml().rstrip())


@app.command()
def models() -> None:
    """List the networks that a recipe's `model` names."""
    _show(listings.of_models())


@app.command()
def methods() -> None:
    """List the methods that a recipe's `method` names."""
    _show(listings.of_methods())


@app.command("verifiers")
def list_verifiers() -> None:
    """List the verifiers that `evaluate --verifier` takes."""
    _show(listings.of_verifiers())


@app.command()
def datasets() -> None:
    """List the data sets that a recipe's `dataset` names."""
    _show(listings.of_datasets())


def _say(text: str) -> None:
    reporting.say(reporting.console(), text)


def _show(tables: list[Table]) -> None:
    for table in tables:
        reporting.console().print(table)


app.command("verify-run")(verify)
app.command()(plot)
app.command()(reproduce)


def main() -> None:
    """Run the command line.

    Status 0 done, 1 if `verify-run` finds another figure than was reported, 2 for what the user can
    mend, 130 on Ctrl-C, 143 on SIGTERM.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # a letter that a terminal lacks ends no run
    with stoppable() as stop:
        try:
            status = app(standalone_mode=False)
        except OfOneProcess as error:
            status = _refuse(str(error), from_all=True)
        except UserError as error:
            status = _refuse(str(error))
        except USAGE_ERROR as error:
            status = _refuse(error.format_message())
        except (KeyboardInterrupt, typer.Abort):
            status = 130
        except OSError as error:
            where = "" if error.filename is None else f"{shown(error.filename)}: "
            if not where:
                sys.stdout = io.StringIO()  # if it is that, Python would fail on it at its end
            status = _refuse(f"{where}cannot read or write ({reason(error)})")
    status = stop.status or status or 0
    # Python's end would wait for the solver, and may abort in a thread of communication.
    if is_solving() or distributed.size() > 1:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # as one is that was closed before Python's start
                with suppress(OSError):
                    stream.flush()
        os._exit(status)
    sys.exit(status)


def _refuse(fault: str, from_all: bool = False) -> int:
    """Say in one line, and from one process if not from all, what is wrong."""
    told = fault and (from_all or distributed.rank() == 0)  # a bare call has printed the help
    if told and sys.stderr is not None:
        with suppress(OSError):
            print(f"robust-app: {fault}", file=sys.stderr, flush=True)
    return 2
