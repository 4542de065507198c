"""Losses of bounds beside the plain loss: a forward and a backward pass each."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_app.interval import Interval
from robust_app.losses import certified_loss
from tests.benchmarks import problems
from tests.benchmarks.effort import Effort
from tests.benchmarks.report import Row, medians
from tests.benchmarks.timing import Step, in_turns, ratios

EPSILON = 0.1


def beside_the_plain_loss(effort: Effort) -> Iterator[Row]:
    """IBP on both networks, CROWN-IBP on the small one."""
    aims = {"IBP loss": "≤ 2.1", "CROWN-IBP loss": "≤ 12"}
    for model, rounds, crown in (
        (effort.small, effort.rounds, True),
        (effort.large, effort.few, False),
    ):
        seconds = in_turns(_sides(model, effort.batch, crown), rounds)
        for name in list(seconds)[1:]:
            yield Row(
                "bounds",
                f"{model}, batch {effort.batch}",
                f"{name} ÷ plain loss",
                ratios(seconds[name], seconds["plain loss"]),
                effort.aim(aims[name]),
                seconds=medians(seconds, "plain loss", name),
            )


def _sides(model: str, batch_size: int, crown: bool) -> dict[str, Step]:
    network, (x, labels) = problems.network_of(model), problems.images(batch_size)

    def plain() -> Tensor:
        return F.cross_entropy(network(x), labels)

    def certified(crown_share: float) -> Tensor:
        box = Interval.around(x, torch.tensor(EPSILON))
        return certified_loss(network, box, labels, crown_share=crown_share)

    def differentiated(loss: Callable[[], Tensor]) -> None:
        network.zero_grad()
        loss().backward()

    losses = {"plain loss": plain, "IBP loss": partial(certified, 0.0)}
    if crown:
        losses["CROWN-IBP loss"] = partial(certified, 1.0)
    return {name: partial(differentiated, loss) for name, loss in losses.items()}
