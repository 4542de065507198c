"""The tests that are to catch mutants: collected once, run in a child of the process for each."""

import importlib
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FrameType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from tests.soak.mutants import Mutant, codes_within, function_of, functions

PATIENCE = 10  # times the processor time that all tests of a mutant take without it
EVERYTHING = ""  # the function that any test of a module reaches

Function = tuple[str, str]
"""A module's name and the qualified name of a function."""


@dataclass
class Outcome:
    """What became of a mutant.

    Attributes:
        mutant: it.
        by: the test that caught it; "" if none did.
        seconds: of processor time.
    """

    mutant: Mutant
    by: str
    seconds: float


@dataclass
class Battery:
    """A plugin of pytest that tries mutants in place of running the tests.

    Attributes:
        modules: names of those that are mutated.
        mutants: to try.
        told: called with each outcome.
        longest: seconds of processor time that a test may take to be asked.
        processes: at a time.
        seconds: of processor time that each test takes, found out first.
    """

    modules: Sequence[str]
    mutants: Sequence[Mutant]
    told: Callable[[Outcome], None]
    longest: float
    processes: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    seconds: dict[str, float] = field(default_factory=dict)

    def pytest_sessionstart(self) -> None:
        """Do not look for small examples: one that fails will do."""
        import hypothesis  # which pytest has to come upon before us

        quick = set(hypothesis.Phase) - {hypothesis.Phase.shrink, hypothesis.Phase.explain}
        hypothesis.settings.register_profile(
            "battery",
            hypothesis.settings.get_profile(hypothesis.settings.get_current_profile_name()),
            phases=[phase for phase in hypothesis.Phase if phase in quick],
            report_multiple_bugs=False,
        )
        hypothesis.settings.load_profile("battery")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Find out what tests reach, then try the mutants."""
        items = {item.nodeid: item for item in session.items}
        reached = self._surveyed(items)
        waiting = iter(self.mutants)
        running: dict[int, tuple[Mutant, int]] = {}
        try:
            for mutant in waiting:
                names = reached[mutant.module, mutant.function]
                names = [n for n in names if self.seconds[n] <= self.longest]
                names.sort(key=self.seconds.__getitem__)
                if len(running) == self.processes:
                    self._await(running)
                pid, reader = _forked(partial(self._child, mutant, [items[n] for n in names]))
                running[pid] = mutant, reader
            while running:
                self._await(running)
        finally:
            for pid in running:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
        return True

    def _await(self, running: dict[int, tuple[Mutant, int]]) -> None:
        pid, status, usage = os.wait3(0)
        mutant, reader = running.pop(pid)
        with os.fdopen(reader) as said:
            by = said.read()
        if not by and status != 0:
            by = "the time it takes" if os.WIFSIGNALED(status) else "the module itself"
        self.told(Outcome(mutant, by, usage.ru_utime + usage.ru_stime))

    def _child(self, mutant: Mutant, items: Sequence[pytest.Item]) -> Iterator[str]:
        most = PATIENCE * sum(self.seconds[item.nodeid] for item in items) + PATIENCE
        resource.setrlimit(resource.RLIMIT_CPU, (int(most), int(most) + 1))
        mutant.apply()
        for item in items:
            if not _passes(item):
                yield item.nodeid
                return

    def _surveyed(self, items: dict[str, pytest.Item]) -> dict[Function, list[str]]:
        """The tests that reach each function."""
        codes = {
            code: (name, function)
            for name in self.modules
            for function in functions(importlib.import_module(name))
            for code in codes_within(function_of(importlib.import_module(name), function).__code__)
        }
        lines = self._lines(items, codes)
        if len(lines) < len(items) or not lines[-1][1]:
            raise pytest.UsageError(f"without a mutant: {lines[-1:]}")
        reached = defaultdict(list)
        for name, _, seconds, functions_reached in lines:
            self.seconds[name] = seconds
            for function in {tuple(f) for f in functions_reached}:
                reached[function].append(name)
            for module in {module for module, _ in functions_reached}:
                reached[module, EVERYTHING].append(name)
        return reached

    def _lines(self, items: dict[str, pytest.Item], codes: dict[CodeType, Function]) -> list[Any]:
        pid, reader = _forked(lambda: _survey(items, codes))
        with os.fdopen(reader) as said:
            lines = [json.loads(line) for line in said]
        os.waitpid(pid, 0)
        return lines


def _survey(items: dict[str, pytest.Item], codes: dict[CodeType, Function]) -> Iterator[str]:
    for name, item in items.items():
        reached: set[Function] = set()

        def note(
            frame: FrameType, event: str, argument: Any, into: set[Function] = reached
        ) -> None:
            if frame.f_code in codes:
                into.add(codes[frame.f_code])

        before = time.process_time()
        sys.settrace(note)
        try:
            passes = _passes(item)
        finally:
            sys.settrace(None)
        yield json.dumps([name, passes, time.process_time() - before, sorted(reached)]) + "\n"
        if not passes:
            return


def _passes(item: pytest.Item) -> bool:
    """Run a test."""
    return not any(report.failed for report in runtestprotocol(item, nextitem=None, log=False))


def _forked(work: Callable[[], Iterator[str]]) -> tuple[int, int]:
    """Begin to write what ``work`` yields in a child: its process, and where to read."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (1, 2):
            os.dup2(nowhere, number)
        for line in work():
            os.write(writer, line.encode())
        status = 0
    finally:
        os._exit(status)
