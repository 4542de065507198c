"""What the user sees: a live line in a terminal, plain lines elsewhere, tables."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from robust_app.error_counts import Errors
from robust_app.schedules import Setting
from robust_app.watching import Means

REFRESH_SECONDS = 0.25  # reading the means takes time, so not after every batch


class Silent:
    """Watches for a process that does not speak."""

    def batch(self, epoch: int, batch: int, batches: int, now: Setting, means: Means) -> None:
        """Say nothing."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


class Lines(Silent):
    """A plain line after each epoch, and notes.

    Args:
        console: where to.
        epochs: length of the run.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Print the epoch."""
        line = f"epoch {metrics['epoch']:>{len(str(self.epochs))}}/{self.epochs}  "
        name = f"stage {metrics['stage']}" if metrics["stage"] else metrics["phase"]
        line += f"{name:<11}  {summary(metrics)}"
        if metrics["verified_error"] is not None:
            line += f"  held out: standard {metrics['standard_error']:.2f}%"
            line += f" verified {metrics['verified_error']:.2f}%"
        say(self.console, f"{line}  {metrics['seconds']:.1f}s")

    def note(self, text: str) -> None:
        """Print it."""
        say(self.console, text)


class Live(Lines):
    """The lines, and below them the epoch in progress.

    Args:
        console: a terminal.
        epochs: length of the run.
        progress: shown by the caller.
    """

    def __init__(self, console: Console, epochs: int, progress: Progress) -> None:
        super().__init__(console, epochs)
        self.progress = progress
        self.task = progress.add_task("", total=None, values="")
        self.refreshed = 0.0

    def batch(self, epoch: int, batch: int, batches: int, now: Setting, means: Means) -> None:
        """Show losses, ε, c_t, weights and share of conflicts, a few times a second.

        On a GPU, where nothing waits for the device within an epoch, ``means`` are empty and the
        batches are those that were launched.
        """
        if time.monotonic() - self.refreshed < REFRESH_SECONDS and batch < batches:
            return
        self.refreshed = time.monotonic()
        values = {"epsilon": now.epsilon, "fosc_threshold": now.fosc_threshold, **means.read()}
        self.progress.update(
            self.task,
            description=f"epoch {epoch + 1}/{self.epochs} {now.phase.value}",
            completed=batch,
            total=batches,
            values=summary(values),
        )


def summary(values: dict[str, Any]) -> str:
    """Losses, weights, share of conflicts, ε and c_t of an epoch, those that it has.

    >>> summary({"epsilon": 0.1, "fosc_threshold": 0.0, "natural_loss": 0.5})
    'natural 0.500  ε 0.1000'
    >>> summary({"epsilon": 0.1, "natural_loss": 2.1e34})  # it is about to diverge
    'natural 2.1e+34  ε 0.1000'
    """
    parts = []
    for name in ("natural", "adversarial", "certified", "mixed"):
        if f"{name}_loss" in values:
            loss = values[f"{name}_loss"]
            part = f"{name} {loss:.3f}" if loss < 1e6 else f"{name} {loss:.3g}"
            if f"{name}_weight" in values:
                part += f" ×{values[f'{name}_weight']:.2f}"
            parts.append(part)
    if "conflicts" in values:
        parts.append(f"conflicts {values['conflicts']:.0%}")
    parts.append(f"ε {values['epsilon']:.4f}")
    if "conflicts" in values:
        parts.append(f"c_t {values['fosc_threshold']:.1e}")
    return "  ".join(parts)


@contextmanager
def watcher(console: Console, epochs: int) -> Iterator[Lines]:
    """What fits where the output goes: live in a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield Lines(console, epochs)
        return
    values = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what is cut where it is narrow
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}", table_column=values),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        yield Live(console, epochs, progress)


@contextmanager
def evaluating(console: Console, what: str, images: int) -> Iterator[Callable[[int], None]]:
    """A bar while images are attacked and verified; yields what to tell of each batch."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(escape(what), total=images)
        yield lambda count: progress.update(task, advance=count)


def errors_table(title: str, rows: Iterable[tuple[str, Errors]]) -> Table:
    """Standard, PGD and verified error with their counts, a row a network."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for column in ("standard", "PGD", "verified", "certified", "falsified", "undecided"):
        table.add_column(column, justify="right")
    for name, errors in rows:
        table.add_row(
            escape(name),
            *(
                f"{value:.2f}%"
                for value in (errors.standard_error, errors.pgd_error, errors.verified_error)
            ),
            *(str(count) for count in (errors.certified, errors.falsified, errors.undecided)),
        )
    return table


def shares_table(rows: Iterable[tuple[str, Errors]]) -> Table:
    """What the attack and each verifier of a cascade decided, a row each."""
    table = Table(title="decided by", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for column in ("images asked", "certified", "falsified", "seconds"):
        table.add_column(column, justify="right")
    for name, errors in rows:
        for by, share in errors.shares.items():
            counts = (share.examples, share.certified, share.falsified)
            table.add_row(escape(name), by, *map(str, counts), f"{share.seconds:.1f}")
    return table


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Have it told, where rich and typer would end the process without a word."""
        raise BrokenPipeError("standard output was closed by who read it")


def console() -> Console:
    """Standard output: as wide as the terminal, or as a table needs where there is none."""
    output = _Output()
    return output if output.is_terminal else _Output(width=120)


def say(console: Console, text: str) -> None:
    """Print lines as they are: neither marked up nor coloured, and broken nowhere else."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def listing(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """What there is, a row each."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
