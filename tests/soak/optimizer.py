"""Long use of the optimizer: memory that stays flat, and states that lose nothing."""

import gc
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mogd import Threshold, UnbiasedMultiGradient
from tests.soak import report
from tests.soak.effort import Effort
from tests.soak.soundness import Unsound

LOOKS = 20  # at memory, in each case
SHARE_UNSEEN = 0.2  # of a case's steps, in which allocators and caches may grow
BYTES_PER_STEP = 512  # that resident memory may grow: half of a leak that is to be noticed
SLACK = 2**21  # bytes by which it wavers
SLACK_TENSORS = 32  # what is just loaded has no gradients and no record yet
ACCUMULATED = 7  # each so-many-th step is of two micro-batches
TARGETS = (1.0, -2.0, 0.5)  # of the losses: none can be met with another


@dataclass(frozen=True)
class Case:
    """An optimizer to use for long.

    Attributes:
        losses: their number.
        base: class of the base.
        options: of the base.
        scaled: whether by way of a GradScaler.
    """

    losses: int
    base: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    scaled: bool = False


CASES = {
    "SGD with momentum, 2 losses": Case(2, torch.optim.SGD, {"momentum": 0.9}),
    "Adam, 2 losses, GradScaler": Case(2, torch.optim.Adam, scaled=True),
    "SGD with Nesterov's momentum, 3 losses, GradScaler": Case(
        3, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, scaled=True
    ),
    "AdamW, 3 losses": Case(3, torch.optim.AdamW),
}


class Training:
    """A small network, its optimizer and its scaler.

    Args:
        case: what to make.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.priority = Threshold(lambda losses: losses[0] - losses[-1], limit=0.0)
        self.optimizer = UnbiasedMultiGradient(
            self.model.parameters(), case.base, lr=1e-3, priority=self.priority, **case.options
        )
        self.scaler = GradScaler("cpu", init_scale=2.0**8, enabled=case.scaled)

    def step(self, number: int) -> None:
        """Train on the examples of a step, in micro-batches now and then."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(16, 3, generator=generator)
        parts = x.chunk(2) if number % ACCUMULATED == 0 else (x,)
        self.optimizer.zero_grad()
        with self.optimizer.accumulate():
            for part in parts[:-1]:
                self.optimizer.backward(self._losses(part, len(parts)), scaler=self.scaler)
        self.optimizer.backward(self._losses(parts[-1], len(parts)), scaler=self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _losses(self, x: Tensor, parts: int) -> Iterator[Tensor]:
        for target in TARGETS[: self.case.losses]:
            yield (self.model(x) - target * x[:, :2]).square().mean() / parts

    def state(self) -> dict[str, Any]:
        """All that is to be kept."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def saved_and_loaded(self) -> "Training":
        """What a new process would make of it."""
        file = io.BytesIO()
        torch.save(self.state(), file)
        file.seek(0)
        state, again = torch.load(file, weights_only=True), Training(self.case)
        again.model.load_state_dict(state["model"])
        again.optimizer.load_state_dict(state["optimizer"])
        again.scaler.load_state_dict(state["scaler"])
        return again


def same(one: Any, other: Any) -> bool:
    """Whether two nested states have the same bits."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    if not file.exists():
        return 0
    return int(file.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    """The number of the tensors alive, but for those that were frozen."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def watch(step: Callable[[int], object], steps: int) -> dict[str, Any]:
    """Take steps and look at the memory in between.

    Args:
        step: takes the step of this number.
        steps: their number, at least ``LOOKS``.

    Raises:
        Unsound: there were more tensors in the second half than in the first, or more memory held.
    """
    counts, bytes_held, at = [], [], []
    started = time.perf_counter()
    gc.collect()
    gc.freeze()  # what was there before is not looked at each time
    try:
        for number in range(1, steps + 1):
            step(number)
            if number >= SHARE_UNSEEN * steps and number % (steps // LOOKS) == 0:
                counts.append(tensors())
                bytes_held.append(resident())
                at.append(number)
    finally:
        gc.unfreeze()
    seconds = time.perf_counter() - started
    growth, watched = bytes_held[-1] - bytes_held[0], at[-1] - at[0]
    half = len(counts) // 2
    if max(counts[half:]) > max(counts[:half]) + SLACK_TENSORS:
        raise Unsound(f"tensors after steps {at}: {counts}")
    if growth > BYTES_PER_STEP * watched + SLACK:
        raise Unsound(f"bytes held after steps {at}: {bytes_held}")
    return {
        "steps": steps,
        "steps watched": watched,
        "tensors made meanwhile and alive": counts[-1],
        "resident MB": round(bytes_held[-1] / 2**20, 1),
        "resident growth in bytes a step": round(growth / watched, 1),
        "seconds": round(seconds, 1),
    }


def use(case: Case, steps: int) -> dict[str, Any]:
    """Train beside a twin that is saved and loaded again and again.

    Raises:
        Unsound: the twin is another one, or memory has grown.
    """
    never = Training(case)
    twins, trips = [Training(case)], 0
    every = max(10, steps // 100)

    def step(number: int) -> None:
        nonlocal trips
        never.step(number)
        twins[0].step(number)
        if number % every == 0:
            if not same(never.state(), twins[0].state()):
                raise Unsound(f"step {number}: a saved and loaded optimizer has gone another way")
            twins[0] = twins[0].saved_and_loaded()
            trips += 1

    found = watch(step, steps)
    last = never.optimizer.last
    assert last is not None
    return found | {
        "states saved and loaded": trips,
        "skipped": never.optimizer.skipped,
        "weights at the end": [round(weight, 4) for weight in last.weights.tolist()],
    }


def soak(effort: Effort, console: Console, output: Path) -> None:
    """Use the optimizer of each case for its share of the steps.

    Raises:
        Unsound: memory has grown, or a state has lost something.
    """
    found = {}
    for name, case in CASES.items():
        found[name] = use(case, effort.steps // len(CASES))
        console.print(f"  {name}: {found[name]}", highlight=False)
        report.save("optimizer", report.command("optimizer", effort), found, output)
