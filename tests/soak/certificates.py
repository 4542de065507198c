"""Certificates of trained networks: attacked by all means, and compared with those of float32.

    python -m tests.soak.certificates RUN_DIR [--data-root DIR]

Also a part of ``python -m tests.soak``, on a network of the embedded digits.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from robust_app import certificates, crown, data, loading, margins, recipes, session, tightening
from robust_app.attacks import pgd, uniform_start
from robust_app.batches import as_float
from robust_app.distributed import World
from robust_app.evaluation import CHUNK
from robust_app.interval import Interval
from robust_app.overrides import with_epochs
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.soak import report
from tests.soak.effort import Effort
from tests.soak.soundness import Unsound

STEPS = 10  # of PGD from each start
CORNERS_FOR_EACH_START = 7  # images with each pixel at an end of its range: cheap
ROUNDS = 5  # of timing


def soak(effort: Effort, console: Console, folder: Path) -> None:
    """Train on the digits, and examine the network.

    Raises:
        Unsound: a certified image has a counterexample.
    """
    started = time.perf_counter()
    config, digits = with_epochs(recipes.load("digits"), effort.epochs), data.load("digits")
    with tempfile.TemporaryDirectory() as place:
        directory = RunDirectory(Path(place))
        directory.start(config)
        trainer = Trainer(config, digits, World(0, 1, torch.device("cpu")))
        session.run(trainer, directory, Silent(), config.total_epochs)
        found = examine(directory, digits, effort.attempts, console)
    found["seconds"] = round(time.perf_counter() - started, 1)
    report.save("certificates", report.command("certificates", effort), found, folder)


def examine(
    directory: RunDirectory, dataset: data.Dataset, attempts: int, console: Console
) -> dict[str, Any]:
    """What is certified of a run's best network, by which bounds; and that nothing of it breaks.

    Args:
        directory: of the run.
        dataset: its own.
        attempts: at least so many, over all certified images.
        console: told of each result.

    Raises:
        Unsound: a certified image has a counterexample.
    """
    config = directory.config()
    network, epoch = loading.load_network(directory, dataset, "best")
    x, labels, epsilon = as_float(dataset.x_test), dataset.y_test, config.evaluation_epsilon
    facts = {"model": config.model, "dataset": config.dataset, "epsilon": epsilon, "epoch": epoch}
    bounds = {}
    for name, (ours, theirs) in BOUNDS.items():
        bounds[name] = compare(ours, theirs, network, x, labels, epsilon)
        console.print(f"{name}: {bounds[name]}", markup=False)
    # All that intervals certify is among it.
    proved = torch.cat([crown.crown_ibp(network, *part, epsilon) for part in chunks(x, labels)])
    tried = attack(network, x[proved], labels[proved], epsilon, attempts)
    console.print(f"attempts on what crown-ibp certifies: {tried}", markup=False)
    return {"network": facts, "bounds": bounds, "attempts": tried}


# --- Attempts --------------------------------------------------------------------------------


def attack(
    network: nn.Module, x: Tensor, labels: Tensor, epsilon: float, attempts: int
) -> dict[str, int]:
    """Look for a misclassified image in each ball, in rounds: PGD from a random start, and corners.

    Returns:
        How many images, starts of PGD and corners were tried.

    Raises:
        Unsound: one was found.
    """
    generator = torch.Generator().manual_seed(0)
    starts = corners = 0
    while starts + corners < attempts:
        for images, classes in chunks(x, labels):
            for candidates in _candidates(network, images, classes, epsilon, generator):
                with torch.no_grad():
                    wrong = network(candidates).argmax(1) != classes
                if wrong.any():
                    raise Unsound(f"{int(wrong.sum())} certified images have counterexamples")
        starts += len(x)
        corners += CORNERS_FOR_EACH_START * len(x)
    return {"images": len(x), "starts of PGD": starts, "corners": corners, "counterexamples": 0}


def _candidates(
    network: nn.Module, x: Tensor, labels: Tensor, epsilon: float, generator: torch.Generator
) -> Iterator[Tensor]:
    start = uniform_start(x, generator)
    size = 2.5 * epsilon / STEPS
    yield pgd(network, x, labels, epsilon, start=start, steps=STEPS, step_size=size)
    for _ in range(CORNERS_FOR_EACH_START):
        yield (x + epsilon * uniform_start(x, generator).sign()).clamp(0, 1)


# --- Bounds that know of rounding, and bounds that do not ------------------------------------

Prove = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


@torch.no_grad()
def float32_ibp(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Interval bounds in float32, as in training."""
    return _unrounded(network, x, labels, epsilon).proved


def _unrounded(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> tightening.Problem:
    trace = tuple(margins.layer_inputs(network, Interval.around(x, epsilon)))
    bounds = margins.margins_after(*trace[-1], labels).scatter(1, labels.unsqueeze(1), torch.inf)
    return tightening.Problem(trace, labels, torch.zeros_like(bounds), bounds)


def _float32(*stages: tightening.Tightening) -> Prove:
    @torch.no_grad()
    def prove(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        correct = (network(x).argmax(1) == labels).nonzero().squeeze(1)
        proved = torch.zeros(len(x), dtype=torch.bool)
        problem = _unrounded(network, x[correct], labels[correct], epsilon)
        for stage in stages:
            left = ~problem.proved
            proved[correct] = problem.proved
            correct, problem = correct[left], stage(problem.only(left))
        proved[correct] = problem.proved
        return proved

    return prove


BOUNDS: dict[str, tuple[Prove, Prove]] = {
    "ibp": (certificates.certified, float32_ibp),
    "crown-ibp": (crown.crown_ibp, _float32(tightening.relax)),
    "alpha-crown-ibp": (crown.alpha_crown_ibp, _float32(tightening.relax, tightening.optimize)),
}


def compare(
    ours: Prove, theirs: Prove, network: nn.Module, x: Tensor, labels: Tensor, epsilon: float
) -> dict[str, Any]:
    """Certified images of both, and the median over rounds of the ratio of their times."""
    counts: list[int] = []
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        counts = []
        for prove, times in zip((ours, theirs), seconds, strict=True):
            started = time.perf_counter()
            counts.append(
                sum(int(prove(network, *part, epsilon).sum()) for part in chunks(x, labels))
            )
            times.append(time.perf_counter() - started)
    ratios = [mine / other for mine, other in zip(*seconds, strict=True)]
    return {
        "images": len(x),
        "certified": counts[0],
        "by float32 bounds": counts[1],
        "time, as a ratio": round(statistics.median(ratios), 2),
    }


def chunks(x: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, as many at a time as an evaluation takes."""
    return zip(torch.split(x, CHUNK), torch.split(labels, CHUNK), strict=True)


def main(arguments: Sequence[str]) -> None:
    """Examine the network of a run."""
    parser = argparse.ArgumentParser(prog="tests.soak.certificates", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    directory = RunDirectory(given.run)
    dataset = data.load(directory.config().dataset, given.data_root)
    found = examine(directory, dataset, given.attempts, Console())
    name = directory.config().dataset
    command = "python -m tests.soak.certificates RUN_DIR --data-root DIR --output DIR"
    report.save(f"certificates-{name}", command, found, given.output)


if __name__ == "__main__":
    main(sys.argv[1:])
