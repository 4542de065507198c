"""A run, killed before each single step of each of its writes."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.soak import report
from tests.soak.effort import Effort
from tests.soak.forked import Forked, begin, prepare, resume, running
from tests.soak.soundness import Unsound, check

RUN = ("train", "--epochs", "2", "--set", "batch_size=1200", "--set", "pgd_steps=1")
STEPS = ("open", "os.mkdir", "os.rename", "os.remove")  # as Python's audit hooks name them


class Suicide:
    """Kills its process before its so-many-th step on a file of a folder.

    Args:
        folder: of the run.
        at: number of the step, from 0.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.seen = str(folder), at, 0

    def __call__(self) -> None:
        """Begin to watch; nothing ends this but the process."""
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS or not str(arguments[0]).startswith(self.folder):
            return
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1


def soak(effort: Effort, console: Console, output: Path) -> None:
    """Kill before every step, or each so-many-th; resume; compare.

    Raises:
        Unsound: something was lost.
    """
    started = time.perf_counter()
    prepare()
    at, survived, status = 0, 0, -signal.SIGKILL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin(RUN, folder / "unbroken")
        while True:
            run = folder / f"step-{at}"
            child = Forked((*RUN, "--run-dir", run), folder, first=Suicide(run, at))
            with running(child):
                status = child.wait()
            check(run)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                raise Unsound(f"step {at}: status {status}, {child.errors.read_text()}")
            resume(RUN, run, folder / "unbroken")
            survived += 1
            at += effort.every
            console.print(f"  {survived} steps", highlight=False)
    found = {"steps of writes": survived, "seconds": round(time.perf_counter() - started)}
    report.save("writes", report.command("writes", effort), found, output)
