"""Time and memory of combining K gradients of P entries: how they grow with both."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mogd import UnbiasedMultiGradient
from tests.benchmarks import problems
from tests.benchmarks.effort import Effort
from tests.benchmarks.memory import peak
from tests.benchmarks.report import Row, medians
from tests.benchmarks.timing import Step, in_turns, ratios

LOSSES = (2, 4, 8)
TENSORS = 5
COLUMNS = 100  # of each parameter, a matrix
LEARNING_RATE = 1e-6  # the parameters are shared between the sides, and stay near where they were
SHARE = 0.8  # of the machine's free memory that a case may take


def over_parameters(effort: Effort) -> Iterator[Row]:
    """mogd, the weighted sum and TorchJD's three on regressions whose backward pass is cheap."""
    for entries in effort.entries:
        for count in LOSSES:
            if not fits(entries, count, free_memory()):
                continue
            yield _compared(entries, count, effort)


def fits(entries: int, count: int, free: int) -> bool:
    """Whether TorchJD's step, the largest, has room beside mogd's moments.

    Jacobian, its copy as one matrix and what autograd makes of it: 3 K gradients; moments: K;
    parameters, gradient, its copy, a temporary: 4.

    >>> fits(10**8, 2, free=8 * 10**9), fits(10**8, 8, free=8 * 10**9)
    (True, False)
    """
    return 4 * entries * (4 * count + 4) <= SHARE * free


def free_memory() -> int:
    """Bytes of the machine that nobody uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def regressions(entries: int, count: int) -> tuple[list[nn.Parameter], Callable[[], list[Tensor]]]:
    """Parameters of ``entries`` in all, and ``count`` least-squares losses of them.

    Each loss reads every parameter once; each gradient is an outer product, written once.
    """
    torch.manual_seed(0)
    rows = entries // TENSORS // COLUMNS
    parameters = [nn.Parameter(torch.randn(rows, COLUMNS)) for _ in range(TENSORS)]
    x = torch.randn(count, COLUMNS)

    def losses() -> list[Tensor]:
        return [
            torch.stack([(parameter @ point - k).square().mean() for parameter in parameters]).sum()
            for k, point in enumerate(x)
        ]

    return parameters, losses


def inverse_norms(gramian: Tensor) -> Tensor:
    """Weights for any number of losses: 1/‖mₖ‖."""
    return gramian.diagonal().rsqrt()


def _sides(
    parameters: Sequence[nn.Parameter], losses: Callable[[], list[Tensor]], count: int
) -> dict[str, Callable[[], Step]]:
    """How each side is made, with plain gradient descent below it."""
    sgd = partial(torch.optim.SGD, parameters, lr=LEARNING_RATE)

    def stepping(aggregate: Callable[[list[Tensor]], object]) -> Step:
        optimizer = sgd()

        def step() -> None:
            optimizer.zero_grad()
            aggregate(losses())
            optimizer.step()

        return step

    def mogd() -> Step:
        rule = {} if count == 2 else {"rule": inverse_norms}
        optimizer = UnbiasedMultiGradient(parameters, lr=LEARNING_RATE, **rule)
        return lambda: optimizer.step(losses)

    def torchjd(name: str, thrifty: bool = False) -> Step:
        return stepping(problems.torchjd_aggregation(list(parameters), name, thrifty=thrifty))

    return {
        "weighted sum": partial(stepping, lambda made: torch.stack(made).sum().backward()),
        "mogd": mogd,
        **{name: partial(torchjd, name) for name in problems.AGGREGATORS},
        "UPGrad, thrifty": partial(torchjd, "UPGrad", thrifty=True),
    }


def _compared(entries: int, count: int, effort: Effort) -> Row:
    parameters, losses = regressions(entries, count)
    size = sum(parameter.nbytes for parameter in parameters)
    made = _sides(parameters, losses, count)

    def forget() -> None:
        for parameter in parameters:
            parameter.grad = None

    gradients = {}
    for name, make in made.items():
        forget()

        def two_steps(make: Callable[[], Step] = make) -> None:
            step = make()
            step()
            step()

        gradients[name] = peak(two_steps) / size
    forget()
    rounds = 2 if entries >= 10**8 else effort.few if entries >= 10**7 else effort.rounds
    least = 0.01 if entries < 10**6 else 0.0
    seconds = in_turns({name: make() for name, make in made.items()}, rounds, least)
    return Row(
        "aggregation",
        f"P = {entries:,}, K = {count}",
        "mogd ÷ weighted sum",
        ratios(seconds["mogd"], seconds["weighted sum"]),
        seconds=medians(seconds),
        gradients=gradients,
    )
