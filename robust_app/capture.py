"""Steps captured in CUDA graphs: the host names a whole step to the GPU, not each operation."""

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.execution import Compiled, Eager, Report, Step, Values, all_or_nothing
from robust_app.schedules import Phase, Setting

WARM_UP = 3
"""Steps that run as they are before one is captured: what a step makes lazily is made by then."""


class Captured(Eager):
    """Captures a step in a CUDA graph and replays it with other data and numbers.

    Steps that consist of other operations are captured anew, after :data:`WARM_UP` real steps; of
    these a run has few: one for each phase, for each part of a loss that comes or goes, and once
    BatchNorm is frozen.
    """

    name = "graph"
    captures = True

    def __init__(self, step: Step, device: torch.device) -> None:
        super().__init__(step, device)
        self._structure: object = None
        self._taken = 0  # steps of this structure
        self._values: Values
        self._inputs: tuple[Tensor, ...]
        self._replay: Callable[[], object] | None = None
        self._report: Report

    @classmethod
    def check(cls, world: World) -> None:
        """Refuse what has no CUDA graphs, and several processes."""
        if world.device.type != "cuda":
            raise UserError(f"--execution: graph needs a GPU, found {world.device.type}")
        if world.size > 1:
            raise UserError("--execution: graph is for one process, use eager with torchrun")

    def __call__(self, now: Setting, x: Tensor, labels: Tensor, start: Tensor) -> Report:
        inputs = (x, labels, start)
        structure = (now.phase, now.first_batch_norm_frozen, *all_or_nothing(now).items())
        if structure != self._structure:
            self._structure, self._taken, self._replay = structure, 0, None
            self._values = Values.tensors(now, self.device)
            self._inputs = tuple(torch.empty_like(part) for part in inputs)
        self._values.fill(now)
        for buffer, part in zip(self._inputs, inputs, strict=True):
            buffer.copy_(part)
        self._taken += 1
        if self._taken <= WARM_UP:
            return self.warm_up(lambda: self._run(now.phase))
        if self._replay is None:
            self._replay, self._report = self.capture(lambda: self._run(now.phase))
        self._replay()
        return self._report

    def _run(self, phase: Phase) -> Report:
        x, labels, start = self._inputs
        return self.step(phase, self._values, x, labels, start)

    def warm_up(self, run: Callable[[], Report]) -> Report:
        """Run a step on the stream of the captures, as torch asks for before one."""
        side = self._side_stream
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*without CUDA graph capture", UserWarning)
            report = run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        return report

    def capture(self, run: Callable[[], Report]) -> tuple[Callable[[], object], Report]:
        """Note what a step does to the device, without doing it.

        Returns:
            What does it, and the tensors in which it then leaves its report.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side_stream):
            report = run()
        return graph.replay, report

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream:
        """One for all: memory that one stream has used is not given to another."""
        stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return stream


EXECUTIONS: Mapping[str, type[Eager]] = {kind.name: kind for kind in (Eager, Captured, Compiled)}
"""The ways to run steps, by the name that the command line gives them."""
