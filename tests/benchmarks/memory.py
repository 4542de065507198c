"""The largest memory of a call, and of a joint step that makes its losses lazily."""

import gc
import os
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from mogd import UnbiasedMultiGradient
from tests.benchmarks import problems
from tests.benchmarks.effort import Effort
from tests.benchmarks.problems import Problem
from tests.benchmarks.report import Row
from tests.benchmarks.timing import summary


def peak(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator holds at once beyond what it held before the call.

    torch.profiler sees every allocation, also those inside an operation.
    """
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes a line at each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda at: at[0]):
        held += change
        most = max(most, held)
    return most


def beside_the_largest_loss(effort: Effort) -> Iterator[Row]:
    """Joint steps beside the larger of their losses alone; the moments exist already."""
    for model, batch in ((effort.small, effort.batch), (effort.large, max(1, effort.batch // 8))):
        problem = problems.joint(model, batch)
        gradient = sum(parameter.nbytes for parameter in problem.parameters)
        largest = max(peak(lambda loss=loss: loss().backward()) for loss in _fresh(problem))
        lazy, together = (_peak_of_mogd(problem, lazily) for lazily in (True, False))
        buffer = gradient  # the first loss's gradient waits while the second loss is made
        for figure, most, aim in (
            ("lazy losses ÷ largest loss, one gradient set aside", lazy - buffer, "≤ 1.05"),
            ("lazy losses ÷ largest loss", lazy, ""),
            ("losses in a list ÷ largest loss", together, ""),
        ):
            yield Row(
                "memory",
                f"{model}, batch {batch}",
                figure,
                summary([most / largest]),
                effort.aim(aim),
            )


def _fresh(problem: Problem) -> Iterator[Callable[[], torch.Tensor]]:
    """The losses, each met without gradients."""
    for loss in problem.losses:
        problem.network.zero_grad()
        yield loss
    problem.network.zero_grad()


def _peak_of_mogd(problem: Problem, lazily: bool) -> int:
    optimizer = UnbiasedMultiGradient(problem.parameters, lr=0.0, priority=problem.priority)

    def backward() -> None:
        optimizer.backward(problem.made() if lazily else list(problem.made()))

    backward()  # makes the moments
    optimizer.zero_grad()
    most = peak(backward)
    optimizer.zero_grad()
    return most
