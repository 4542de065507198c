"""What a step with mogd costs beside the weighted sum of the same losses.

``make bench`` runs this, prints one table and writes it to ``docs/results/step-cost.{json,md}``.
Both sides do the same forward passes; they are timed in turns, in one process, with
``torch.utils.benchmark``, and compared by their medians.
"""

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from mogd import Threshold, UnbiasedMultiGradient
from robust_app import methods, models, recipes
from robust_app.fosc import Stationarity
from robust_app.losses import Objective
from robust_app.schedules import setting
from robust_app.steps import Batch, Losses
from tests.mogd.test_memory import matrices, objectives, peak_in_gradients, peak_of_the_base

RESULTS = Path(__file__).parents[2] / "docs" / "results"
COLUMNS = ("case", "parameters", "weighted sum, ms", "mogd, ms", "ratio", "quartiles")
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One problem to step on: a network and its two losses, made anew at each step."""

    name: str
    network: nn.Module
    losses: Callable[[nn.Module, Stationarity], Iterator[Tensor]]
    rounds: int


def mlp_case() -> Case:
    """Two regressions by a small MLP: the optimizer's own work shows most."""
    x, targets = torch.randn(64, 32), torch.randn(2, 64, 8)

    def losses(network: nn.Module, stationarity: Stationarity) -> Iterator[Tensor]:
        for target in targets:
            yield nn.functional.mse_loss(network(x), target)

    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    return Case("MLP 32-64-8, batch 64", network, losses, rounds=300)


def joint_case(model: str, batch_size: int, rounds: int) -> Case:
    """The joint step of AdvIBP on images of MNIST's size: attack, adversarial, certified loss."""
    config = recipes.load("mnist-dm-small")
    now = setting(config, 80)  # within the ramp of ε
    batch = Batch.of_images(
        torch.rand(batch_size, 1, 28, 28),
        torch.randint(10, (batch_size,)),
        torch.rand(batch_size, 1, 28, 28) * 2 - 1,
        torch.tensor(now.epsilon),
    )
    method = methods.find(config.method)

    def losses(network: nn.Module, stationarity: Stationarity) -> Iterator[Tensor]:
        made = Losses(Objective(network), network, method, method.attack(config), stationarity)
        return made.of(method.losses, batch, now)

    network = models.build(model, (1, 28, 28), classes=10)
    return Case(f"joint step {model}, batch {batch_size}", network, losses, rounds)


def weighted_sum_step(case: Case) -> Step:
    """What one writes without mogd: add the losses up, differentiate once, step."""
    network, stationarity = copy.deepcopy(case.network), Stationarity()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(case.losses(network, stationarity))).sum().backward()
        optimizer.step()

    return step


def mogd_step(case: Case) -> Step:
    """The same with the paper's rule; on images, with the FOSC priority too."""
    network, stationarity = copy.deepcopy(case.network), Stationarity()
    measured = Threshold(stationarity, limit=1e-4)
    optimizer = UnbiasedMultiGradient(
        network.parameters(),
        torch.optim.Adam,
        lr=5e-4,
        priority=(lambda losses: 0) if case.name.startswith("MLP") else measured,
    )
    return lambda: optimizer.step(lambda: case.losses(network, stationarity))


def compare(case: Case) -> dict[str, object]:
    """Time both steps in turns and count gradient-sized buffers."""
    sides = {"weighted sum": weighted_sum_step(case), "mogd": mogd_step(case)}
    for step in sides.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(case.rounds):
        for name, step in sides.items():
            timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
            seconds[name].append(timer.timeit(1).mean)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [ours / base for base, ours in zip(*seconds.values(), strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "case": case.name,
        "parameters": sum(parameter.numel() for parameter in case.network.parameters()),
        "rounds": case.rounds,
        "weighted_sum_ms": 1e3 * medians["weighted sum"],
        "mogd_ms": 1e3 * medians["mogd"],
        "ratio": medians["mogd"] / medians["weighted sum"],
        "ratio_quartiles": [quartiles[0], quartiles[2]],
    }


def gradient_sized_buffers() -> float:
    """Most gradient-sized buffers alive at once, beyond training with the base alone."""
    parameters = matrices()
    without = peak_of_the_base(parameters)
    optimizer = UnbiasedMultiGradient(parameters, lr=0.1, momentum=0.9)
    step = partial(optimizer.step, partial(objectives, *parameters))
    return peak_in_gradients(step, parameters[0].nbytes) - without


def main() -> None:
    """Run all cases, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    torch.manual_seed(0)
    cases = [mlp_case(), joint_case("dm-small", 256, 40), joint_case("dm-large", 256, 3)]
    rows = [compare(case) for case in cases]
    report = {
        "what": "Median time of a step, mogd ÷ weighted sum of the same losses, base Adam",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gradient_sized_buffers": gradient_sized_buffers(),
        "rows": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "step-cost.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "step-cost.md").write_text(markdown(report))
    table = Table(*COLUMNS, title=report["what"])
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table, f"buffers beyond plain training: {report['gradient_sized_buffers']:.2g}")


def cells(row: dict[str, object]) -> tuple[str, ...]:
    """A row as text."""
    low, high = row["ratio_quartiles"]  # type: ignore[misc]
    return (
        str(row["case"]),
        f"{row['parameters']:,}",
        f"{row['weighted_sum_ms']:.2f}",
        f"{row['mogd_ms']:.2f}",
        f"{row['ratio']:.3f}",
        f"{low:.3f}-{high:.3f}",
    )


def markdown(report: dict[str, object]) -> str:
    """The report as a Markdown table with its circumstances."""
    lines = [
        "# Cost of a step",
        "",
        f"{report['what']}.",
        "",
        f"Command: `make bench`. Machine: {report['machine']}; torch {report['torch']}, "
        f"Python {report['python']}; seed 0. The two sides are timed in turns in one process; the "
        "quartiles are of the ratios of neighbouring turns. Absolute times are of that machine and "
        "mean nothing elsewhere.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|--:|--:|--:|--:|--:|",
        *(f"| {' | '.join(cells(row))} |" for row in report["rows"]),  # type: ignore[attr-defined]
        "",
        "Most gradient-sized buffers alive beyond plain training with the base, two losses: "
        f"{report['gradient_sized_buffers']:.2g} (tests/mogd/test_memory.py holds it to 3).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
