"""A variation trained in a directory of its own, resumed where it stopped, and measured."""

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from robust_app import checkpoint, loading, runner
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.evaluation import evaluate
from robust_app.reproduction.reproduce import check_config
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.studies.variations import Variation

ALONE = World(0, 1, torch.device("cpu"))


class VariedTrainer(Trainer):
    """Weighs as a variation says, also after a run was resumed; lots are drawn anew then."""

    def __init__(self, variation: Variation, config: Config, dataset: Dataset) -> None:
        self.variation = variation
        super().__init__(config, dataset, ALONE)

    def begin_stage(self, number: int) -> None:
        """See :meth:`Trainer.begin_stage`; called whenever the optimizer is made."""
        super().begin_stage(number)
        self.variation.apply_to(self.optimizer)


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
        shared_epochs: how many epochs the runs of ``joint`` variations have in common, before any
            trains on both losses; trained once.
    """

    config: Config
    epsilons: tuple[float, ...]
    dataset: Dataset
    data_root: Path | None
    folder: Path
    start: Path | None = None
    shared_epochs: int = 0


def carry_out(setup: Setup, variation: Variation, seed: int, console: Console) -> None:
    """Train and measure what is not yet; leave alone what another process holds.

    Raises:
        UserError: the directory holds another run, or the run failed.
    """
    directory, config = _place(setup, variation, seed)
    with ExitStack() as held:
        try:
            held.enter_context(directory.locked())
        except UserError as error:
            console.print(f"left out, {error}", markup=False, soft_wrap=True)
            return
        check_config(directory, config)
        if not directory.results():
            if variation.joint and setup.shared_epochs and not directory.checkpoint_file.exists():
                begin_as_shared(setup, config, directory, console)
            train(setup, variation, config, directory, console, config.total_epochs)
            directory.add_results(measure(setup, config, directory))


def row(setup: Setup, variation: Variation, seed: int) -> dict[str, Any] | None:
    """What a run has found; None if it is not done."""
    directory, _ = _place(setup, variation, seed)
    found, metrics = directory.results(), directory.metrics()
    if not found:
        return None
    told = ("adversarial_weight", "certified_weight", "conflicts", "certified_first")
    return {
        "name": variation.name,
        "family": variation.family,
        "seed": seed,
        "errors": found,
        "last_epoch": {name: metrics[-1][name] for name in told if name in metrics[-1]},
        "seconds": sum(epoch["seconds"] for epoch in metrics),
        "commits": [made["commit"] for made in directory.environments()],
    }


def _place(setup: Setup, variation: Variation, seed: int) -> tuple[RunDirectory, Config]:
    directory = RunDirectory(setup.folder / f"{slug(variation.name)}-seed{seed}")
    return directory, dataclasses.replace(setup.config, seed=seed, **variation.changes)


def begin_as_shared(
    setup: Setup, config: Config, directory: RunDirectory, console: Console
) -> None:
    """Put the epochs that runs have in common into a directory, as if they were trained there."""
    shared = RunDirectory(setup.folder / f"shared-seed{config.seed}")
    common = Variation("the shared epochs", "")
    with shared.locked():
        train(
            setup,
            common,
            dataclasses.replace(setup.config, seed=config.seed),
            shared,
            console,
            setup.shared_epochs,
        )
        directory.start(config)
        shutil.copy(shared.metrics_file, directory.path)
        # The checkpoint last: with it the run has begun.
        for file in (shared.best_file, shared.last_file, shared.checkpoint_file):
            saved = checkpoint.load(file) | {"config": config.to_toml()}
            checkpoint.save(saved, directory.path / file.name)


def train(
    setup: Setup,
    variation: Variation,
    config: Config,
    directory: RunDirectory,
    console: Console,
    epochs: int,
) -> None:
    """Begin or resume a run and bring it to the end of so many epochs."""
    trainer = VariedTrainer(variation, config, setup.dataset)
    if setup.start is not None:  # a checkpoint, if there is one, is loaded over it
        network, _ = loading.load_network(RunDirectory(setup.start), setup.dataset, "last")
        trainer.network.load_state_dict(network.state_dict())
    console.print(f"{variation.name}, seed {config.seed}", markup=False)
    runner.train(trainer, directory, console, data_root=setup.data_root, stop_after=epochs)


def measure(setup: Setup, config: Config, directory: RunDirectory) -> list[dict[str, Any]]:
    """Errors of the last network on all test images in percent, a row a radius."""
    network, epoch = loading.load_network(directory, setup.dataset, "last")
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
