"""Training, killed at random moments, resumed, and compared with a run that nobody killed."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tests.soak import report
from tests.soak.effort import Effort
from tests.soak.forked import Forked, begin, command, prepare, resume, running
from tests.soak.soundness import Unsound, check, epochs_done

# Warm-up, joint phase and a layer-wise stage; an epoch is a fraction of a second.
RUN = (
    *("train", "--epochs", "4", "--set", "batch_size=600", "--set", "pgd_steps=1"),
    *("--set", "stages=1", "--set", "stage_epochs=1", "--device", "cpu"),
)
GO_ON = 0.93  # share of starts that are broken off; the others run to the end
WRITES = 8  # of about 30 that a whole run has
COMMAND = "command line"
STARTUP = 5.0  # seconds, about, that the true command line needs before it begins
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass
class Killed:
    """What the attempts have found.

    Attributes:
        fell: how many kills of each kind fell where.
        runs: that were killed, resumed to their end and found equal to the unbroken one.
    """

    fell: dict[str, Counter[str]] = field(default_factory=dict)
    runs: int = 0

    def count(self, kind: str) -> int:
        """Kills of a kind."""
        return sum(self.fell.get(kind, Counter()).values())

    def note(self, kind: str, place: str) -> None:
        """One more."""
        self.fell.setdefault(kind, Counter())[place] += 1


class Attempts:
    """Runs that are killed, resumed and killed again until they are let run to their end.

    Args:
        unbroken: finished run that each must equal.
        seconds: of the processor that it took.
        folder: for the runs.
        seed: of the moments.
    """

    def __init__(self, unbroken: Path, seconds: float, folder: Path, seed: int) -> None:
        self.unbroken, self.seconds, self.folder = unbroken, seconds, folder
        self.random = random.Random(seed)
        self.found = Killed()

    def run(self, wanted: dict[str, int], progress: Callable[[Killed], object]) -> Killed:
        """Go on until as many kills of each kind have happened as wanted."""
        number = 0
        while missing := {
            kind: count - self.found.count(kind)
            for kind, count in wanted.items()
            if count > self.found.count(kind)
        }:
            number += 1
            self._one_run(self.folder / f"run-{number}", missing)
            progress(self.found)
        return self.found

    def _one_run(self, folder: Path, missing: dict[str, int]) -> None:
        done: int | None = None
        while missing and self.random.random() < GO_ON:
            kinds = [kind for kind in missing if kind != COMMAND] or [COMMAND]  # these are slow
            [kind] = self.random.choices(kinds, weights=[missing[kind] for kind in kinds])
            broken = self._killed(folder, kind)
            check(folder, at_least=done)
            done = epochs_done(folder)
            if not broken:
                break
            missing[kind] -= 1
            missing = {kind: count for kind, count in missing.items() if count}
        resume(RUN, folder, self.unbroken, at_least=done)
        self.found.runs += 1

    def _killed(self, folder: Path, kind: str) -> bool:
        """Start or resume a run and kill it; False if it came to its end before."""
        if kind == COMMAND:
            return self._kill_the_command(folder)
        number = signal.Signals[kind]
        child = Forked(command(RUN, folder), self.folder)
        with running(child):
            if not self._moment(child):
                if child.status != 0:
                    raise Unsound(f"{folder}: {child.status}, {child.errors.read_text()}")
                return False
            place = child.place
            child.send(number)
            status = child.wait(60)
        errors = child.errors.read_text()
        early = place == "starting" and status == -number  # before the program has begun
        if status == 0:
            return False  # it was done already
        if errors or not (status == STATUS[number] or early):
            raise Unsound(f"{folder}: {kind} in {place} gave status {status}, {errors}")
        told = "continue with: robust-app train" in child.output.read_text()
        if place not in ("starting", "drawing") and number != signal.SIGKILL and not told:
            raise Unsound(f"{folder}: {kind} in {place} does not say how to continue")
        self.found.note(kind, place)
        return True

    def _moment(self, child: Forked) -> bool:
        """Wait for a random one: anywhere, in a write, or in an evaluation."""
        chosen = self.random.random()
        if chosen < 0.4:
            self._pause(child, 0.5 * self.seconds)
        elif chosen < 0.85:
            for _ in range(self.random.randint(1, WRITES)):
                child.until(lambda: child.place != "writing")
                if not child.until(lambda: child.place == "writing"):
                    break
            self._pause(child, 0.004)
        else:
            evaluation = self.random.choice(("held-out evaluation", "final evaluation", "drawing"))
            child.until(lambda: child.place == evaluation)
            self._pause(child, 0.2)
        return not child.ended()

    def _pause(self, child: Forked, seconds: float) -> None:
        """Wait up to so many seconds of the processor, whatever else the machine does."""
        end = child.processor_seconds() + self.random.uniform(0, seconds)
        child.until(lambda: child.processor_seconds() > end)

    def _kill_the_command(self, folder: Path) -> bool:
        """The same, of ``python -m robust_app`` in an interpreter of its own."""
        line = [sys.executable, "-m", "robust_app", *map(str, command(RUN, folder))]
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                process.wait(self.random.uniform(0, STARTUP + self.seconds))
            except subprocess.TimeoutExpired:
                process.kill()
            _, errors = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise Unsound(f"{folder}: status {process.returncode}, {errors.decode()}")
        if process.returncode == 0:
            return False
        done = epochs_done(folder)
        self.found.note(COMMAND, "starting" if done is None else f"after epoch {done}")
        return True


def soak(effort: Effort, console: Console, output: Path) -> None:
    """Kill at random moments; what is found is saved after each run."""
    started = time.perf_counter()
    prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unbroken = folder / "unbroken"
        seconds = begin(RUN, unbroken).used
        attempts = Attempts(unbroken, seconds, folder, seed=0)
        wanted = {
            "SIGKILL": effort.kills - effort.commands,
            COMMAND: effort.commands,
            "SIGTERM": effort.signals,
            "SIGINT": effort.signals,
        }

        def progress(killed: Killed) -> None:
            found = {
                "kills asked for": wanted,
                "kills": {kind: dict(counts) for kind, counts in sorted(killed.fell.items())},
                "runs equal to the unbroken one": killed.runs,
                "processor seconds of the unbroken one": round(seconds, 2),
                "seconds": round(time.perf_counter() - started),
            }
            report.save("kills", report.command("kills", effort), found, output)
            console.print(f"  {found}", highlight=False, soft_wrap=True)

        attempts.run(wanted, progress)
