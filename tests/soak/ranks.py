"""Runs of several processes, one of which is killed."""

import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from robust_app import cli
from tests.soak import report
from tests.soak.effort import Effort
from tests.soak.forked import Forked, command, prepare, running
from tests.soak.kills import RUN
from tests.soak.soundness import Unsound, check, differences, epochs_done

BOUND = 60  # seconds in which the processes that are left must end, on a busy machine too
RESTARTS = 3


def soak(effort: Effort, console: Console, output: Path) -> None:
    """Kill one of two and of three, without torchrun's help and with it."""
    started = time.perf_counter()
    prepare()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        runs = [Lost(size, Path(name)) for size in (2, 3)]
        for number in range(max(effort.lost, effort.restarts)):
            for lost in runs:
                if number < effort.lost:
                    lost.kill_one(number)
                if number < effort.restarts:
                    lost.restart(number)
                found[f"{lost.size} processes"] = lost.found()
                found["seconds"] = round(time.perf_counter() - started)
                report.save("ranks", report.command("ranks", effort), found, output)
                console.print(f"  {found}", highlight=False, soft_wrap=True)


class Lost:
    """Runs of so many processes, one of which is killed.

    Args:
        size: number of processes.
        folder: for the runs.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.random = random.Random(size)
        self.killed: Counter[str] = Counter()
        self.longest, self.restarted = 0.0, 0
        self.unbroken = folder / f"unbroken-{size}"
        began = time.perf_counter()
        self.used = self._to_the_end(self.unbroken)
        self.seconds = time.perf_counter() - began

    def found(self) -> dict[str, Any]:
        """Figures, for a report."""
        return {
            "killed": dict(self.killed),
            "longest until the others had ended, seconds": round(self.longest, 2),
            "resumed to the bits of the unbroken run": sum(self.killed.values()),
            "killed, restarted by torchrun's agent, to the same bits": self.restarted,
        }

    def kill_one(self, number: int) -> None:
        """Kill one at a random moment; the others must end and say so, and a new start go on."""
        place = self.folder / f"lost-{self.size}-{number}"
        while True:
            children = together(command(RUN, place), self.size, self.folder)
            with running(*children):
                broken = self._kill_one_of(children)
            check(place)
            if broken:
                break
        self._to_the_end(place)
        self._compare(place)

    def _kill_one_of(self, children: Sequence[Forked]) -> bool:
        victim = self.random.choice(children)
        # Before that they look for each other, and wait as long as torch has them wait.
        victim.until(lambda: victim.place != "starting")
        end = victim.processor_seconds() + self.random.uniform(0, 0.7 * self.used)
        victim.until(lambda: victim.processor_seconds() > end)
        if victim.ended():
            return False
        where = victim.place
        victim.send(signal.SIGKILL)
        since = time.perf_counter()
        others = [child for child in children if child is not victim]
        statuses = [child.wait(BOUND) for child in others]
        self.longest = max(self.longest, time.perf_counter() - since)
        for child, status in zip(others, statuses, strict=True):
            errors = child.errors.read_text()
            told = errors.startswith("robust-app: process ") and errors.count("\n") == 1
            told = told and "cannot go on" in errors and "--resume" in errors
            if not (status == 0 and not errors) and not (status == 2 and told):
                raise Unsound(f"killed in {where}; status {status} of another, {errors}")
        self.killed[f"rank {children.index(victim)}, {where}"] += 1
        return True

    def restart(self, number: int) -> None:
        """Kill one under torchrun's agent, which starts all of them again."""
        place = self.folder / f"restart-{self.size}-{number}"
        agent = os.fork()
        if agent == 0:
            try:
                _launch((*RUN, "--run-dir", place), self.size, self.folder / "restart.log")
            finally:
                os._exit(1)
        try:
            while epochs_done(place) is None:
                _check_alive(agent)
                time.sleep(0.05)
            time.sleep(self.random.uniform(0, 0.8 * self.seconds))
            workers = _children(agent)
            killed = len(workers) == self.size
            if killed:
                os.kill(self.random.choice(workers), signal.SIGKILL)
            _, status = os.waitpid(agent, 0)
        except BaseException:
            for process in (*_children(agent), agent):
                os.kill(process, signal.SIGKILL)
            os.waitpid(agent, 0)
            raise
        if status != 0:
            log = (self.folder / "restart.log").read_text()
            raise Unsound(f"{place}: the agent's status is {status}, {log}")
        check(place)
        self._compare(place)
        self.restarted += killed

    def _compare(self, place: Path) -> None:
        if different := differences(self.unbroken, place):
            raise Unsound(f"{place}: another result in {', '.join(different)}")

    def _to_the_end(self, place: Path) -> float:
        """Seconds of the processor that the leading process took."""
        children = together(command(RUN, place), self.size, self.folder)
        with running(*children):
            for child in children:
                if child.wait() != 0:
                    raise Unsound(f"{place}: status {child.status}, {child.errors.read_text()}")
        return children[0].used


def together(arguments: Sequence[object], size: int, folder: Path) -> list[Forked]:
    """The command in so many processes that know of each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Forked(
            arguments,
            folder,
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            name=f"rank-{rank}",
        )
        for rank in range(size)
    ]


def _launch(arguments: Sequence[object], size: int, log: Path) -> None:
    """What torchrun does, with processes that are forked; ends this one with status 0."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id="soak",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=RESTARTS,
        start_method="fork",
    )
    elastic_launch(config, _work)(list(map(str, arguments)))
    os._exit(0)


def _work(arguments: list[str]) -> None:
    sys.argv = ["robust-app", *arguments]
    try:
        cli.main()
    except SystemExit as stopped:
        if stopped.code:
            os._exit(int(stopped.code))


def _children(process: int) -> list[int]:
    """Of all its threads, as Linux tells."""
    threads = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in threads for child in file.read_text().split()]


def _check_alive(process: int) -> None:
    pid, status = os.waitpid(process, os.WNOHANG)
    if pid:
        raise Unsound(f"torchrun's agent ended with status {status}")
