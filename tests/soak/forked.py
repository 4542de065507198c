"""The command line in a child process that begins where this one has imported everything."""

import importlib
import io
import math
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from robust_app import (
    checkpoint,
    cli,
    curves,
    data,
    evaluating,
    pictures,
    run_directory,
    runner,
    session,
    training,
)
from tests.soak.soundness import Unsound, check, differences

PLACES = (
    "starting",
    "training",
    "held-out evaluation",
    "writing",
    "final evaluation",
    "drawing",
)
# What a child is in while it is in a function; the innermost counts.
PLACED = (
    (session, "run", "training"),
    (training, "held_out_errors", "held-out evaluation"),
    (checkpoint, "save", "writing"),
    (run_directory, "_write", "writing"),
    (evaluating, "evaluate", "final evaluation"),
    (runner, "_draw", "drawing"),
)
PATIENCE = 600  # seconds after which a child counts as hung
POLL = 1e-3


def prepare() -> None:
    """Import what a run imports on its way, here and once."""
    importlib.import_module("torch._dynamo")  # by any optimizer
    data.load("digits")
    small_figure({}).savefig(io.BytesIO())


def small_figure(_: object) -> Figure:
    """A picture in place of a run's curves, whose drawing takes longer than the whole run."""
    return pictures.panels(1, 1, (1, 1))[0]


class Forked:
    """``robust-app`` with these arguments, in a folder, as a child of this process.

    Fork, not a fresh interpreter, because importing torch takes longer than the whole run. This
    process must have no threads: it may import torch but not compute with it in parallel.

    Args:
        arguments: of the command.
        folder: the child's current one; its output goes into files there.
        first: called in the child before anything else.
        environment: added to this process's.
        name: of the files of output.

    Attributes:
        status: of exit, -N of a signal N; None while it runs.
        used: seconds of the processor, when it has ended.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        first: Callable[[], object] = lambda: None,
        environment: Mapping[str, str] = {},
        name: str = "output",
    ) -> None:
        self.output, self.errors = (folder / f"{name}.{end}" for end in ("out", "err"))
        self._place = mmap.mmap(-1, 1)
        self.status: int | None = None
        self.used = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            status: Any = 70
            try:
                self._begin(folder, environment)
                first()
                sys.argv = ["robust-app", *map(str, arguments)]
                cli.main()
            except SystemExit as stopped:
                status = stopped.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                try:
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(status)

    def _begin(self, folder: Path, environment: Mapping[str, str]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment)
        os.chdir(folder)
        for number, path in ((1, self.output), (2, self.errors)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        curves.figure = small_figure
        for module, function, place in PLACED:
            setattr(module, function, self._placed(getattr(module, function), place))

    def _placed(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        number = PLACES.index(place)

        def noting(*arguments: Any, **options: Any) -> Any:
            before, self._place[0] = self._place[0], number
            try:
                return function(*arguments, **options)
            finally:
                self._place[0] = before

        return noting

    @property
    def place(self) -> str:
        """What the child is doing, or did last."""
        return PLACES[self._place[0]]

    def processor_seconds(self) -> float:
        """That the child has used so far; infinite when it has ended."""
        if self.ended():
            return math.inf
        return time.clock_gettime(~self.pid << 3 | 2)  # as Linux numbers the clocks of processes

    def ended(self) -> bool:
        """Whether the child is no more; then :attr:`status` is its status, -N of a signal N."""
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.used = usage.ru_utime + usage.ru_stime
        return self.status is not None

    def until(self, condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
        """Wait for a condition; False if the child has ended before it.

        Raises:
            TimeoutError: neither came; the child is killed.
        """
        deadline = time.monotonic() + patience
        while not self.ended():
            if condition():
                return True
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"hung in {self.place}: {self.errors.read_text()}")
            time.sleep(POLL)
        return False

    def wait(self, patience: float = PATIENCE) -> int:
        """Its status, when it has ended.

        Raises:
            TimeoutError: it has not in so many seconds; it is killed.
        """
        self.until(lambda: False, patience)
        assert self.status is not None
        return self.status

    def send(self, number: signal.Signals) -> None:
        """Send a signal, and wait for the child's end if it is SIGKILL."""
        if not self.ended():
            os.kill(self.pid, number)
            if number == signal.SIGKILL:
                _, status = os.waitpid(self.pid, 0)
                self.status = os.waitstatus_to_exitcode(status)


@contextmanager
def running(*children: Forked) -> Iterator[None]:
    """Leave none of them behind, whatever happens."""
    try:
        yield
    finally:
        for child in children:
            child.send(signal.SIGKILL)


def call(arguments: Sequence[object], folder: Path, **options: Any) -> Forked:
    """A child that has ended."""
    child = Forked(arguments, folder, **options)
    with running(child):
        child.wait()
    return child


def command(run: Sequence[object], folder: Path) -> tuple[object, ...]:
    """What a user would type: begin the run, or resume it where there is one."""
    begun = (folder / "config.toml").exists()
    return ("train", "--run-dir", folder, "--resume") if begun else (*run, "--run-dir", folder)


def begin(run: Sequence[object], folder: Path, **options: Any) -> Forked:
    """A run, begun or resumed and brought to its end.

    Raises:
        Unsound: it failed.
    """
    child = call(command(run, folder), folder.parent, **options)
    errors = child.errors.read_text()
    if child.status != 0 or errors:
        raise Unsound(f"{folder}: status {child.status}, {errors}")
    return child


def resume(
    run: Sequence[object], folder: Path, unbroken: Path, at_least: int | None = None
) -> Forked:
    """Bring a run that was broken off to its end, and compare it with one that was not.

    Raises:
        Unsound: it failed, or its result is another one.
    """
    child = begin(run, folder)
    check(folder, at_least)
    if different := differences(unbroken, folder):
        raise Unsound(f"{folder}: another result in {', '.join(different)}")
    return child
