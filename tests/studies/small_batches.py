"""Where the past helps: two regressions that pull apart, by the size of the batches.

    python -m tests.studies.small_batches

With exact gradients the rule leads to a point that depends on the losses alone. With batches the
same rule should lead to the same point, but for noise that averages out. The table says how far
from it the mean end of many runs lies, in units of the distance between the two losses' minima.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from mogd import BisectorProjection, Constant, Fixed, Rule, UnbiasedMultiGradient
from tests.studies.variations import OwnBatch

FEATURES, EXAMPLES, STEPS, STEP_SIZE = 10, 1024, 1500, 0.02
BATCHES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Way:
    """How a step is weighed."""

    optimizer: Callable[..., UnbiasedMultiGradient]
    rule: Rule
    moment_decay: tuple[float, float] = (0.9, 0.99)


WAYS = {
    "weighted sum": Way(UnbiasedMultiGradient, Constant((0.5, 0.5))),
    "past gradients": Way(UnbiasedMultiGradient, BisectorProjection()),
    "past gradients, ‖m‖ for v": Way(
        UnbiasedMultiGradient, BisectorProjection(length="norm_of_mean")
    ),
    "the same, β₁ = 0.99": Way(
        UnbiasedMultiGradient, BisectorProjection(length="norm_of_mean"), (0.99, 0.99)
    ),
    "this batch's gradients": Way(OwnBatch, BisectorProjection()),
}


class Problem:
    """Two linear targets of the same features, the second with noise of its own size."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(EXAMPLES, FEATURES, generator=random, dtype=torch.float64)
        truths = torch.randn(FEATURES, 2, generator=random, dtype=torch.float64)
        noise = torch.randn(EXAMPLES, 2, generator=random, dtype=torch.float64)
        self.y = self.x @ truths + noise * torch.tensor([0.5, 2.0], dtype=torch.float64)
        self.minima = torch.linalg.lstsq(self.x, self.y).solution

    def losses(self, theta: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Half the mean squared errors on some examples."""
        for target in (0, 1):
            yield 0.5 * (self.x[rows] @ theta - self.y[rows, target]).square().mean()

    @property
    def apart(self) -> Tensor:
        """The distance between the two minima."""
        return (self.minima[:, 0] - self.minima[:, 1]).norm()


def end(problem: Problem, way: Way, batch: int, seed: int, steps: int = STEPS) -> Tensor:
    """Where a run ends, its step size falling linearly to a hundredth."""
    random = torch.Generator().manual_seed(seed)
    theta = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = way.optimizer(
        [theta],
        lr=STEP_SIZE,
        rule=way.rule,
        moment_decay=way.moment_decay,
        priority=Fixed(0),
    )
    schedule = LinearLR(optimizer, 1.0, 0.01, steps)
    everything = torch.arange(EXAMPLES)
    for _ in range(steps):
        rows = torch.randint(EXAMPLES, (batch,), generator=random)
        optimizer.backward(problem.losses(theta, rows if batch < EXAMPLES else everything))
        optimizer.step()
        schedule.step()
    return theta.detach()


def main(batches: tuple[int, ...] = BATCHES, seeds: int = 8, steps: int = STEPS) -> None:
    """Print the table of all ways and batch sizes."""
    problem = Problem()
    print("| weights from | exact, to the first minimum | " + " | ".join(map(str, batches)) + " |")
    print("|---" + "|---:" * (1 + len(batches)) + "|")
    for name, way in WAYS.items():
        exact = end(problem, way, EXAMPLES, 0, steps)
        to_minima = (problem.minima - exact.unsqueeze(1)).norm(dim=0) / problem.apart
        cells = [f"{float(to_minima[0]):.2f}"]
        for batch in batches:
            ends = torch.stack([end(problem, way, batch, seed, steps) for seed in range(seeds)])
            off = (ends.mean(0) - exact).norm() / problem.apart
            error = (ends.std(0).norm() / seeds**0.5) / problem.apart
            cells.append(f"{float(off):.2f} ± {float(error):.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
