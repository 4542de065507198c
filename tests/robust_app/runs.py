"""Short runs for the tests of training."""

import dataclasses
import math
import os
import sys
from pathlib import Path

import torch

from robust_app import checkpoint, data, recipes
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.methods import METHODS
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.schedules import Phase, Setting
from robust_app.session import run
from robust_app.training import Trainer

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ALONE = World(0, 1, torch.device("cpu"))


def short_config(**changes: object) -> Config:
    """Three epochs on the digits that pass through every phase, ε included."""
    schedule = {"epochs": 3, "natural_epochs": 0.5, "adversarial_epochs": 0.5, "ramp_epochs": 1.0}
    small = {"batch_size": 96, "held_out": 141, "fosc_decay_epochs": 0.5, "milestones": (2.0,)}
    return dataclasses.replace(recipes.load("digits"), **(schedule | small | changes))


def trained(
    config: Config, directory: Path, stops: tuple[int, ...] = (3,), dataset: Dataset | None = None
) -> Trainer:
    """Train in a directory, with a fresh process's worth of objects after each stop."""
    files = RunDirectory(directory)
    files.path.mkdir(parents=True, exist_ok=True)
    for stop in stops:
        trainer = Trainer(config, dataset or data.load("digits"), ALONE)
        run(trainer, files, Silent(), stop)
    return trainer


def parameters_of(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.network.parameters()).detach()


def few_digits() -> Dataset:
    """As many as make an epoch of three batches of 32."""
    digits = data.load("digits")
    return dataclasses.replace(digits, x_train=digits.x_train[:128], y_train=digits.y_train[:128])


def full_strength(method: str, **changes: object) -> Config:
    """Six epochs of a method on few digits, at its ε from the first step on."""
    at_once = {"epochs": 6, "natural_epochs": 0.0, "adversarial_epochs": 0.0, "ramp_epochs": 0.0}
    schedule = at_once | {"fosc_decay_epochs": 0.0, "milestones": (), "learning_rate": 1e-3}
    small = {"method": method, "epsilon": 0.03, "batch_size": 32, "held_out": 32}
    return dataclasses.replace(recipes.load("digits"), **(schedule | small | changes))


class Spoils(Silent):
    """Breaks a parameter after a batch, as long as the learning rate is above a limit.

    Args:
        trainer: whose last weights to break.
        epoch, batch: when, from 1.
        value: what to put there.
        limit: of the learning rate.
    """

    def __init__(self, trainer, epoch, batch, value=math.nan, limit=0.0):
        self.trainer, self.when, self.value, self.limit = trainer, (epoch, batch), value, limit
        self.notes = []

    def batch(self, epoch, batch, batches, now, means):
        if (epoch + 1, batch) == self.when and now.learning_rate > self.limit:
            self.trainer.network[-1].weight.data[0, 0] = self.value

    def note(self, text):
        self.notes.append(text)


# What a method needs beyond the default.
NEEDED = {
    "diffai": {"natural_weight": (0.25, 0.25)},
    "latent-adversarial": {"stages": 1, "stage_epochs": 3, "stage_learning_rate": 1e-3},
    "crown-ibp": {"crown_share": (0.5, 0.5)},
    "advcrown-ibp": {"crown_share": (0.5, 0.5)},
}
SHI = {"batch_norm": True, "ibp_initialization": True, "box_regularizers": 0.5}


A_MOMENT = Setting(
    phase=Phase.MAIN,
    epsilon=0.05,
    fosc_threshold=0.01,
    learning_rate=0.1,
    natural_weight=0.5,
    crown_share=0.0,
    box_regularizers=0.0,
)


AUGMENTED = {"augment": True, "horizontal_flip": True}


def changing_runs(**changes: object) -> dict[str, Config]:
    """Three epochs in which phases, ε, shares and weights change: each method and other kinds."""
    ramp = {"epochs": 3, "natural_epochs": 0.5, "ramp_epochs": 1.5, "batch_size": 16}
    kinds = {method: {"method": method, **NEEDED.get(method, {})} for method in METHODS}
    kinds["joint with batch norm"] = {"method": "advibp", "adversarial_epochs": 0.5, **SHI}
    kinds["mixed with batch norm"] = {"method": "crown-ibp", "crown_share": (1.0, 0.0), **SHI}
    kinds["by fan-in"] = {"method": "advibp", "reference_fan_in": 30.0, **SHI}
    kinds["a frozen norm"] = {"method": "advibp", "first_batch_norm_frozen_from": 1.5, **SHI}
    kinds["authors"] = {"method": "advibp", "authors_weights": True, "certified_epochs": 1.5}
    kinds["one start"] = {"method": "pgd", "one_start_per_batch": True, **AUGMENTED}
    return {
        name: dataclasses.replace(full_strength(**(ramp | kind | changes)), held_out=48)
        for name, kind in kinds.items()
    }


CHANGING = changing_runs()


def assert_same_files(one: Path, other: Path) -> None:
    """All networks and metrics of two runs, to the bit."""
    names = sorted(file.name for file in one.glob("*.pt"))
    assert names == sorted(file.name for file in other.glob("*.pt"))
    for name in names:
        first, second = (checkpoint.load(folder / name) for folder in (one, other))
        assert first.get("epoch") == second.get("epoch")
        assert first["network"].keys() == second["network"].keys()
        for key, value in first["network"].items():
            assert torch.equal(value, second["network"][key]), (name, key)
    metrics = [
        [{**epoch, "seconds": 0} for epoch in RunDirectory(folder).metrics()]
        for folder in (one, other)
    ]
    assert metrics[0] == metrics[1]


# Options of short runs of the command line.
QUICK = ("--epochs", "2", "--set", "batch_size=400", "--set", "pgd_steps=2")
STAGES = (
    *("--set", "epochs=2", "--set", "milestones=[]", "--set", "natural_epochs=0"),
    *("--set", "adversarial_epochs=0", "--set", "stage_milestones=[]"),
    *("--set", "ramp_epochs=1", "--set", "stages=2", "--set", "stage_epochs=2"),
    *("--set", "batch_size=400", "--set", "pgd_steps=2"),
)


def assert_same_network(one: Path, other: Path, more: tuple[str, ...] = ()) -> None:
    for name in ("checkpoint.pt", "best.pt", "last.pt", *more):
        first, second = (checkpoint.load(path / name)["network"] for path in (one, other))
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)
