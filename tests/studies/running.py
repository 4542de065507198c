"""A variation trained in a directory of its own, resumed where it stopped, and measured."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from robust_app import runner, session
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.evaluation import evaluate
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.studies.variations import Variation

ALONE = World(0, 1, torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs of a study share.

    Attributes:
        config: of every run but for its variation and seed.
        epsilons: radii that the last networks are measured at; PGD at the first one only.
        dataset: what they are trained and measured on.
        data_root: where that lies.
        folder: of their directories.
        start: a run whose last network they begin from; None for a network of their own.
    """

    config: Config
    epsilons: tuple[float, ...]
    dataset: Dataset
    data_root: Path | None
    folder: Path
    start: Path | None = None


def carry_out(setup: Setup, variation: Variation, seed: int, console: Console) -> dict[str, Any]:
    """Train and measure what is not yet, and tell the row of a variation and seed."""
    directory = RunDirectory(setup.folder / f"{slug(variation.name)}-seed{seed}")
    config = dataclasses.replace(setup.config, seed=seed, **variation.changes)
    with directory.locked():
        if not directory.results():
            train(setup, variation, config, directory, console)
            directory.add_results(measure(setup, config, directory))
        metrics = directory.metrics()
        told = ("adversarial_weight", "certified_weight", "conflicts", "certified_first")
        return {
            "name": variation.name,
            "family": variation.family,
            "seed": seed,
            "errors": directory.results(),
            "last_epoch": {name: metrics[-1][name] for name in told if name in metrics[-1]},
            "seconds": sum(epoch["seconds"] for epoch in metrics),
        }


def train(
    setup: Setup, variation: Variation, config: Config, directory: RunDirectory, console: Console
) -> None:
    """Begin or resume a run and bring it to its end."""
    trainer = Trainer(config, setup.dataset, ALONE)
    variation.apply_to(trainer.optimizer)
    if setup.start is not None:  # a checkpoint, if there is one, is loaded over it
        network, _ = session.load_network(RunDirectory(setup.start), setup.dataset, "last")
        trainer.network.load_state_dict(network.state_dict())
    console.print(f"{variation.name}, seed {config.seed}", markup=False)
    end = config.total_epochs
    runner.train(trainer, directory, console, data_root=setup.data_root, stop_after=end)


def measure(setup: Setup, config: Config, directory: RunDirectory) -> list[dict[str, Any]]:
    """Errors of the last network on all test images in percent, a row a radius."""
    network, epoch = session.load_network(directory, setup.dataset, "last")
    rows = []
    for epsilon in setup.epsilons:
        errors = evaluate(
            network,
            setup.dataset.x_test,
            setup.dataset.y_test,
            epsilon,
            pgd_steps=config.pgd_steps if epsilon == setup.epsilons[0] else 1,
            pgd_restarts=config.pgd_restarts,
            seed=config.seed,
        )
        found = {"standard": errors.standard_error, "verified": errors.verified_error}
        if epsilon == setup.epsilons[0]:
            found["PGD"] = errors.pgd_error
        rows.append({"network": f"last (epoch {epoch})", "epsilon": epsilon, **found})
    return rows


def slug(name: str) -> str:
    """A name as a folder's.

    >>> slug("mogd 1 to 0.5, no κ_reg")
    'mogd-1-to-0.5-no-κ_reg'
    """
    return name.replace(",", "").replace("'", "").replace(" ", "-")
