"""The joint step beside the weighted sum, TorchJD, and what the processor could do."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import problems
from tests.benchmarks.effort import Effort
from tests.benchmarks.problems import IMAGE, Problem
from tests.benchmarks.report import Row, medians
from tests.benchmarks.timing import in_turns, ratios, summary

FORWARDS = 11  # FGSM 2, adversarial loss 3, certified loss 6: docs/speed.md
MATRICES = (512, 1024, 2048)  # their products give the machine's rate
SAMPLE = 0.2  # of a step's operations: so many are timed beside each step


def beside_the_weighted_sum(effort: Effort) -> Iterator[Row]:
    """What mogd adds to a step."""
    cases = [
        ("MLP 32-64-8, batch 64", problems.mlp, 5 * effort.rounds, 0.02, ""),
        *(
            (f"{model}, batch {effort.batch}", _joint(model, effort), rounds, 0.0, "≤ 1.02")
            for model, rounds in ((effort.small, effort.rounds), (effort.large, effort.few))
        ),
    ]
    for case, problem, rounds, least, aim in cases:
        sides = {
            "weighted sum": problems.weighted_sum(problem()),
            "weighted sum, a loss at a time": problems.accumulated(problem()),
            "mogd": problems.mogd(problem()),
        }
        seconds = in_turns(sides, rounds, least)
        for name in list(sides)[:2]:
            yield Row(
                "joint step",
                case,
                f"mogd ÷ {name}",
                ratios(seconds["mogd"], seconds[name]),
                effort.aim(aim),
                seconds=medians(seconds, "mogd", name),
            )


def beside_torchjd(effort: Effort) -> Iterator[Row]:
    """The same losses, combined by TorchJD."""
    problem = _joint(effort.small, effort)
    sides = {
        "weighted sum": problems.weighted_sum(problem()),
        "mogd": problems.mogd(problem()),
        **{name: problems.torchjd(problem(), name) for name in problems.AGGREGATORS},
    }
    seconds = in_turns(sides, effort.rounds)
    case = f"{effort.small}, batch {effort.batch}"
    for name in list(sides)[2:]:
        for base in ("mogd", "weighted sum"):
            value = ratios(seconds[name], seconds[base])
            aim = effort.aim("≥ 1.6") if base == "mogd" else ""
            figure = f"TorchJD's {name} ÷ {base}"
            yield Row("TorchJD", case, figure, value, aim, seconds=medians(seconds, name, base))


def beside_the_roofline(effort: Effort) -> Iterator[Row]:
    """How far the joint step is from matrix products of as many operations."""
    size, multiply = fastest_product()
    for model, rounds, aim in (
        (effort.large, effort.few, "≤ 1.3"),
        (effort.small, effort.rounds, "≤ 1.8"),
    ):
        step = FORWARDS * effort.batch * forward_operations(model) / (2 * size**3)
        count = math.ceil(SAMPLE * step)
        name = f"{count} products of {size}x{size}"
        products = partial(_repeat, multiply, count)
        sides = {"joint step": problems.mogd(_joint(model, effort)()), name: products}
        seconds = in_turns(sides, rounds)
        yield Row(
            "roofline",
            f"{model}, batch {effort.batch}",
            f"joint step ÷ ({FORWARDS} forwards' operations at the rate of float32 products)",
            ratios(seconds["joint step"], seconds[name], count / step),
            effort.aim(aim),
            seconds=medians(seconds),
        )


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def forward_operations(model: str) -> int:
    """Floating-point operations of one forward pass of one image, a product and a sum being two.

    >>> forward_operations("dm-small")
    3952848
    """
    network = problems.network_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *IMAGE))
    return counter.get_total_flops()


def fastest_product() -> tuple[int, partial[torch.Tensor]]:
    """The size among :data:`MATRICES` with the highest rate on one pass, and its product."""
    made = {}
    for size in MATRICES:
        one, other = torch.rand(2, size, size)
        made[size] = partial(torch.mm, one, other, out=torch.empty(size, size))
    seconds = in_turns({str(size): multiply for size, multiply in made.items()}, rounds=5)
    rates = {size: size**3 / summary(seconds[str(size)]).median for size in made}
    best = max(rates, key=lambda size: rates[size])
    return best, made[best]


def _joint(model: str, effort: Effort) -> partial[Problem]:
    return partial(problems.joint, model, effort.batch)
