"""Disks that are full or may not be written, clocks that jump, runs that want one directory."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from robust_app.run_directory import RunDirectory
from tests.soak import report
from tests.soak.effort import Effort
from tests.soak.forked import Forked, begin, call, command, prepare, resume, running
from tests.soak.kills import RUN
from tests.soak.soundness import Unsound, check, differences

NOBODY = 65534  # as root may write everywhere
TOO_SMALL = (4, 1_400)  # KiB, of a disk on which the run has no room


class Skipped(Exception):
    """It cannot be tried here, and why."""


def soak(effort: Effort, console: Console, output: Path) -> None:
    """Try each; say what came of it, or why it was not tried.

    Raises:
        Unsound: something was lost, or the program did not say in one line what is wrong.
    """
    started = time.perf_counter()
    prepare()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unbroken = folder / "unbroken"
        begin(RUN, unbroken)
        for attempt in (
            partial(full_disk, count=effort.limits),
            partial(file_limit, count=effort.limits),
            becomes_read_only,
            read_only_system,
            full_output,
            jumping_clock,
            rivals,
        ):
            told = getattr(attempt, "func", attempt).__name__.replace("_", " ")
            try:
                found[told] = attempt(folder, unbroken)
            except Skipped as reason:
                found[told] = f"skipped: {reason}"
            console.print(f"  {told}: {found[told]}", highlight=False, soft_wrap=True)
    found["seconds"] = round(time.perf_counter() - started)
    report.save("adversity", report.command("adversity", effort), found, output)


def refused(child: Forked, *words: str) -> None:
    """See that a child has ended with status 2 and one line.

    Raises:
        Unsound: it has not.
    """
    errors = child.errors.read_text()
    one_line = errors.startswith("robust-app: ") and errors.count("\n") == 1
    if child.status != 2 or not one_line or not all(word in errors for word in words):
        raise Unsound(f"status {child.status}, expected {words} in one line, found {errors!r}")


def full_disk(folder: Path, unbroken: Path, count: int) -> str:
    """Disks that are too small in many ways; each is made larger and the run resumed."""
    stopped = 0
    for number, size in enumerate(_sizes(count)):
        disk = folder / f"disk-{number}"
        with _mounted(disk, f"size={size}k"):
            child = call((*RUN, "--run-dir", disk / "run", "--tensorboard"), folder)
            if child.status == 0:
                continue
            refused(child, "No space left on device")
            check(disk / "run")
            if left := list((disk / "run").glob("*.partial")):
                raise Unsound(f"left behind, on a full disk: {left}")
            _mount("-o", "remount,size=64m", disk)
            resume(RUN, disk / "run", unbroken)
            stopped += 1
    return f"{stopped} sizes, each refused in one line and resumed to the same bits"


def file_limit(folder: Path, unbroken: Path, count: int) -> str:
    """The same without a disk of its own, for those who may not mount one."""
    stopped = 0
    for number, size in enumerate(_sizes(count)):
        limit = (size * 200, resource.RLIM_INFINITY)  # of each file, so a part of the disk
        place = folder / f"limit-{number}"
        limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
        child = call((*RUN, "--run-dir", place), folder, first=limited)
        if child.status == 0:
            continue
        refused(child, "cannot be written", "File too large")
        check(place)
        resume(RUN, place, unbroken)
        stopped += 1
    return f"{stopped} limits, each refused in one line and resumed to the same bits"


def _sizes(count: int) -> list[int]:
    low, high = TOO_SMALL
    return [round(low * (high / low) ** (step / count)) for step in range(1, count + 1)]


def becomes_read_only(folder: Path, unbroken: Path) -> str:
    """In the middle of a run, for a user whom modes bind."""
    place = folder / "becomes-read-only"
    place.mkdir()
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    os.chown(place, user, -1)
    folder.chmod(0o755)
    child = Forked(command(RUN, place), folder, first=partial(os.setuid, user))
    with running(child):
        child.until(lambda: (place / "last.pt").exists())
        place.chmod(0o555)
        child.wait()
    refused(child, "cannot be written", "Permission denied")
    check(place)
    for arguments in (("train", "--run-dir", place, "--resume"), ("evaluate", place)):
        again = call(arguments, folder, first=partial(os.setuid, user))
        refused(again, "cannot be written", "Permission denied")
    place.chmod(0o755)
    resume(RUN, place, unbroken)
    return "refused in one line, running, resumed and evaluated; then resumed to the same bits"


def read_only_system(folder: Path, unbroken: Path) -> str:
    """A finished run on one is refused by the commands that write, and read by the others."""
    disk = folder / "read-only"
    with _mounted(disk, "size=64m"):
        shutil.copytree(unbroken, disk / "run")
        _mount("-o", "remount,ro", disk)
        for arguments in (
            ("train", "--run-dir", disk / "run", "--resume"),
            ("train", "--run-dir", disk / "new"),
            ("evaluate", disk / "run"),
        ):
            refused(call(arguments, folder), "cannot be written", "Read-only file system")
        if different := differences(unbroken, disk / "run"):
            raise Unsound(f"read-only, and changed in {different}")
    return "refused in one line: resumed, begun, evaluated"


def full_output(folder: Path, unbroken: Path) -> str:
    """Standard output goes to a disk that is full."""
    device = Path("/dev/full")
    if not device.exists():
        raise Skipped("no /dev/full")

    def redirect() -> None:
        os.dup2(os.open(device, os.O_WRONLY), 1)

    place = folder / "full-output"
    refused(call(command(RUN, place), folder, first=redirect), "No space left on device")
    check(place)
    resume(RUN, place, unbroken)
    return "refused in one line and resumed to the same bits"


def jumping_clock(folder: Path, unbroken: Path) -> str:
    """Each look at the time of day is up to a year off; nothing of a run depends on it."""
    jumps = random.Random(0)

    def jump() -> None:
        true, true_ns, year = time.time, time.time_ns, 365 * 86_400
        time.time = lambda: true() + jumps.uniform(-year, year)
        time.time_ns = lambda: true_ns() + jumps.randrange(-year, year) * 10**9

    place = folder / "jumping-clock"
    begin((*RUN, "--tensorboard"), place, first=jump)
    if different := differences(unbroken, place):
        raise Unsound(f"by another clock another result in {different}")
    if not all(0 < epoch["seconds"] < 3_600 for epoch in RunDirectory(place).metrics()):
        raise Unsound("the seconds of an epoch are of the time of day")
    return "the same bits"


def rivals(folder: Path, unbroken: Path) -> str:
    """Four that begin one run at once, then three that resume it while it runs."""
    place = folder / "rivals"
    names = [f"rival-{number}" for number in range(4)]
    children = [Forked((*RUN, "--run-dir", place), folder, name=name) for name in names]
    with running(*children):
        statuses = [child.wait() for child in children]
    if statuses.count(0) != 1:
        raise Unsound(f"of four runs in one directory some ended with {statuses}")
    for child in children:
        if child.status != 0:
            refused(child, str(place))
    if different := differences(unbroken, place):
        raise Unsound(f"among rivals another result in {different}")
    second = folder / "rivals-2"
    first = Forked((*RUN, "--run-dir", second), folder, name="first")
    with running(first):
        first.until(lambda: (second / "last.pt").exists())
        first.send(signal.SIGSTOP)  # else it may be done before the others have begun
        again = ("train", "--run-dir", second, "--resume")
        for arguments in (again, ("evaluate", second)):
            refused(call(arguments, folder), "in use by another run")
        first.send(signal.SIGKILL)
    resume(RUN, second, unbroken)  # at once: the lock has died with its process
    return "one of four runs, the others are refused in one line; a dead one's lock is free"


def _mount(*arguments: object) -> None:
    done = subprocess.run(
        ["mount", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Skipped(f"no right to mount ({done.stderr.strip()})")


@contextlib.contextmanager
def _mounted(place: Path, options: str) -> Iterator[None]:
    place.mkdir()
    if shutil.which("mount") is None:
        raise Skipped("no mount here")
    _mount("-t", "tmpfs", "-o", options, "tmpfs", place)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)
