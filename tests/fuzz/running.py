"""Damaged files by number, each read within bounds of time and memory."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

from robust_app.errors import UserError
from tests.fuzz.formats import Format

SECONDS = 5.0
"""Of the processor, for one file."""

PATIENCE = 300.0
"""Seconds of the clock, for one file, on a machine that is shared."""

MEBIBYTES = 256
"""How much the memory in use may grow over all files of a process."""

ADDRESSES = 1024
"""MiB of addresses that may be asked for beyond those after the first file, used or not."""

LINE = 1500
"""Characters of a refusal, which is to be one line that is read."""

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "tests.fuzz.worker"]


class Hang(BaseException):
    """A file took too long; no ``except Exception`` stops it."""


@dataclass
class Tally:
    """What became of damaged files.

    Attributes:
        files: tried.
        loaded: valid still, and gone on with.
        refused: by the function that refused.
        failed: what went wrong, by the file's number.
        slowest: seconds of the processor to read a file, and that file's number.
        growth: MiB by which the most memory in use grew while a file was read.
        unmade: files that could not be made: nested too deep, or too large.
    """

    files: int = 0
    loaded: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)
    growth: float = 0.0
    unmade: int = 0

    def add(self, other: Self) -> None:
        """Count another's files too."""
        self.files += other.files
        self.loaded += other.loaded
        self.refused.update(other.refused)
        self.failed.update(other.failed)
        self.slowest = max(self.slowest, other.slowest)
        self.growth = max(self.growth, other.growth)
        self.unmade += other.unmade

    def as_json(self) -> str:
        """As :meth:`from_json` reads it."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`as_json` wrote."""
        found = json.loads(text)
        found["failed"] = {int(number): why for number, why in found["failed"].items()}
        found |= {"refused": Counter(found["refused"]), "slowest": tuple(found["slowest"])}
        return cls(**found)


def make(form: Format, name: str, seed: int, number: int, folder: Path) -> None:
    """Write the damaged files of a number."""
    form.write(random.Random(f"{seed} {name} {number}"), folder)


def attempt(form: Format, folder: Path) -> str | None:
    """Read the damaged files of a number, as :func:`make` has written them.

    Returns:
        The function that refused them; None if none did.

    Raises:
        Exception: whatever the program would show a traceback of.
        AssertionError: the refusal is no line for a user, memory was asked for that is not there,
            or something in the files was executed.
        Hang: it took longer than :data:`SECONDS` or :data:`PATIENCE`.
    """
    before = sorted(Path().iterdir())
    refused = None
    with _alarm(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            form.read(folder)
        except UserError as error:
            refused = _judge(error)
    assert not warned, f"warns: {warned[0].message}"
    assert sorted(Path().iterdir()) == before, "something was executed"
    return refused


def _judge(error: UserError) -> str:
    """The function that refused, if it did so as it should."""
    text = str(error)
    assert len(text) <= LINE, f"a line of {len(text)} characters: {text[:200]}"
    cause: BaseException | None = error
    first = error  # that others have said more of
    while cause is not None:
        first = cause if isinstance(cause, UserError) else first
        words = f"{type(cause).__name__} {cause}".partition("\n")[0].lower()
        asked = isinstance(cause, MemoryError) or "allocat" in words or "bad_alloc" in words
        assert not asked, f"asked for too much memory: {words[:200]}"

        cause = cause.__cause__
    frame = traceback.extract_tb(first.__traceback__)[-1]
    return f"{Path(frame.filename).stem}.{frame.name}"


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(signal_number: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {SECONDS:g} seconds, or waited for {PATIENCE:g}")

    timers = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: PATIENCE}
    previous = [signal.signal(which, ring) for which in (signal.SIGPROF, signal.SIGALRM)]
    for timer, seconds in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for which, handler in zip((signal.SIGPROF, signal.SIGALRM), previous, strict=True):
            signal.signal(which, handler)


def run(form: Format, name: str, seed: int, numbers: range, told: Any = lambda _: None) -> Tally:
    """Try the files of some numbers in this process; ``told`` is called before each."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as top, contextlib.chdir(_made(Path(top, "here"))):
        for number in numbers:
            told(number)
            folder = _made(Path(top, str(number)))
            try:
                make(form, name, seed, number, folder)
            except Exception:  # a mutation may be more than Python, numpy or torch can write
                tally.unmade += 1
                shutil.rmtree(folder)
                continue
            began, started = _peak(), time.process_time()
            try:
                refused = attempt(form, folder)
                tally.loaded += refused is None
                tally.refused.update([refused] if refused else [])
            except (Exception, Hang) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                tally.failed[number] = f"{type(error).__name__} at {where}: {str(error)[:300]}"
            tally.slowest = max(tally.slowest, (time.process_time() - started, number))
            tally.files += 1
            shutil.rmtree(folder)
            growth = _peak() - began
            if growth > MEBIBYTES and number not in tally.failed:
                tally.failed[number] = f"MemoryError: {growth:.0f} MiB more are in use"
            tally.growth = max(tally.growth, growth)
    return tally


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _peak() -> float:
    """The most memory that this process had in use, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def limit_addresses() -> None:
    """Let no more than :data:`ADDRESSES` be asked for from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESSES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_apart(name: str, seed: int, numbers: range) -> Tally:
    """:func:`run` in processes of their own; one that dies has failed at its number."""
    tally, start = Tally(), numbers.start
    while start < numbers.stop:
        command = [*WORKER, name, str(seed), str(start), str(numbers.stop)]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with tempfile.TemporaryFile("w+") as said:
            status = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=said, stderr=subprocess.PIPE, text=True
            )
            said.seek(0)
            *_, last = said.read().splitlines() or [""]
        if status.returncode == 0:
            tally.add(Tally.from_json(last))
            return tally
        if not last.isdecimal():
            raise RuntimeError(f"no file of {name} could be tried: {status.stderr[-2000:]}")
        died = int(last)
        before = run_apart(name, seed, range(start, died)) if died > start else Tally()
        tally.add(before)
        reason = (status.stderr.strip().splitlines() or [""])[-1]
        tally.files += 1
        tally.failed[died] = f"the process ended with status {status.returncode}: {reason}"
        start = died + 1
    return tally
