"""One global batch, shared by several processes on the CPU."""

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mogd import UnbiasedMultiGradient
from robust_app.distributed import World, join
from robust_app.freed_memory import keep_freed_memory
from tests.benchmarks import problems
from tests.benchmarks.effort import Effort
from tests.benchmarks.problems import LEARNING_RATE, Problem
from tests.benchmarks.report import Row, medians
from tests.benchmarks.timing import Step, Summary, in_turns, ratios, summary

PROCESSES = 2
QUIET = "{} with a barrier instead"


class Together(nn.Module):
    """A network whose ``forward`` is the sum of its losses, for plain DDP."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.network, self.problem = problem.network, problem

    def forward(self) -> Tensor:
        """The sum, 0-dim."""
        return torch.stack(list(self.problem.made())).sum()


def over_processes(effort: Effort) -> Iterator[Row]:
    """Speed-up of two processes over one, and what their communication costs."""
    one, many = (measured(size, effort) for size in (1, PROCESSES))
    case = f"{effort.small}, global batch {effort.batch}, {PROCESSES} processes of one thread"
    row = partial(Row, "processes", case)
    for name in ("weighted sum", "mogd"):
        yield row(
            f"{name}: speed-up over one process",
            ratios(one[name], many[name]),
            seconds={"one": summary(one[name]).median, "many": summary(many[name]).median},
        )
        quiet = QUIET.format(name)
        waiting = ratios(many[quiet], many[name])
        seconds = medians(many, name, quiet, "all-reduce")
        yield row(
            f"{name}: share of a step that communication adds",
            Summary(*(1 - share for share in (waiting.median, waiting.high, waiting.low))),
            percent=True,
            seconds=seconds,
        )


def measured(size: int, effort: Effort) -> dict[str, list[float]]:
    """Seconds of each side in the leading one of ``size`` processes."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(folder) / "seconds.json"
        torch.multiprocessing.spawn(_measure, (size, port, effort, file), nprocs=size)
        found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _measure(rank: int, size: int, port: int, effort: Effort, file: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    keep_freed_memory()
    with join("cpu") as world:
        sides = {"weighted sum": _weighted_sum(world, effort), "mogd": _mogd(world, effort)}
        if size > 1:
            sides[QUIET.format("weighted sum")] = _weighted_sum(world, effort, quiet=True)
            sides[QUIET.format("mogd")] = _mogd(world, effort, quiet=True)
            entries = sum(p.numel() for p in problems.network_of(effort.small).parameters())
            sides["all-reduce"] = partial(torch.distributed.all_reduce, torch.zeros(entries))
        seconds = in_turns(sides, effort.rounds)
        if world.leads:
            file.write_text(json.dumps(seconds), encoding="utf-8")


def _weighted_sum(world: World, effort: Effort, quiet: bool = False) -> Step:
    together = Together(problems.joint(effort.small, effort.batch // world.size))
    module = world.wrap(together)
    optimizer = torch.optim.Adam(together.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        module().backward()
        optimizer.step()

    return _with_a_barrier(module, step) if quiet else step


def _mogd(world: World, effort: Effort, quiet: bool = False) -> Step:
    wrapped: list[nn.Module] = []

    def wrap(objective: nn.Module) -> nn.Module:
        wrapped.append(world.wrap(objective))
        return wrapped[0]

    problem = problems.joint(effort.small, effort.batch // world.size, wrap)
    optimizer = UnbiasedMultiGradient(
        problem.parameters, torch.optim.Adam, lr=LEARNING_RATE, priority=problem.priority
    )
    optimizer.distributed = not quiet
    step = partial(optimizer.step, problem.made)
    return _with_a_barrier(wrapped[0], step) if quiet else step


def _with_a_barrier(module: nn.Module, step: Step) -> Step:
    """The step without all-reduces of gradients; its end still waits for the slowest process."""
    assert isinstance(module, DistributedDataParallel)

    def quiet() -> None:
        with module.no_sync():
            step()
        torch.distributed.barrier()

    return quiet
