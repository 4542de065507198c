"""Times of several sides of one comparison, taken in turns, and what follows from them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

Step = Callable[[], object]
WARM_UP = 3  # calls


class Summary(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def summary(values: Sequence[float]) -> Summary:
    """Median and quartiles of at least one value.

    >>> summary([1.0, 2.0, 3.0])
    Summary(median=2.0, low=1.5, high=2.5)
    """
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float], factor: float = 1.0) -> Summary:
    """Of ``factor`` × ours ÷ theirs in neighbouring turns: what slows both sides cancels.

    >>> ratios([2.0, 6.0, 9.0], [1.0, 3.0, 3.0])
    Summary(median=2.0, low=2.0, high=2.5)
    """
    return summary([factor * our / their for our, their in zip(ours, theirs, strict=True)])


def in_turns(sides: Mapping[str, Step], rounds: int, least: float = 0.0) -> dict[str, list[float]]:
    """Seconds of a call of each side, once a round.

    Every other round goes backwards, so that no side always follows the same one. Before each
    measurement ``torch.utils.benchmark`` calls the side once unmeasured, and before all of them
    each side is called a few times in turns: memory settles only after some steps.

    Args:
        sides: what to call, by name.
        rounds: at least 1.
        least: seconds that a measurement lasts at least; as many calls as that takes are averaged.
            0 measures one call, in all processes of a group alike.
    """
    threads = torch.get_num_threads()
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=threads)
        for name, step in sides.items()
    }
    for step in WARM_UP * list(sides.values()):
        step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):
            measured = timers[name].blocked_autorange(min_run_time=least)
            seconds[name].append(measured.median)
    return seconds
