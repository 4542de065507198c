"""Files of torch.save: checkpoints, networks of a run, weights from elsewhere."""

import copy
import io
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_app import examination, loading, models, session
from robust_app.examination import Examination
from robust_app.exchange import outside
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.fuzz.formats import Format, Write
from tests.fuzz.mutation import (
    Random,
    hostile_value,
    mutate_bytes,
    mutate_members,
    mutate_pickle,
    mutate_value,
)
from tests.robust_app.runs import ALONE, few_digits, full_strength, trained

DIGITS = few_digits()
CONFIG = full_strength("advibp", epochs=2, stages=1)
EXAMINATION = Examination(0.01, pgd_steps=1, pgd_restarts=1)


def hostile_tensor(random: Random) -> Any:
    """A tensor of another kind, or another value."""
    if random.random() < 0.4:
        return hostile_value(random)
    one = torch.ones(random.choice(((), (1,), (2, 3), (0,), (64,), (16, 1, 3, 3))))
    return random.choice(
        (
            lambda: one,
            lambda: one * random.choice((float("nan"), float("inf"), -1.0, 1e30)),
            lambda: one.to(random.choice((torch.int64, torch.bool, torch.complex64, torch.half))),
            lambda: torch.ones(1).expand(random.choice((10**12, 2**28, 64))),
            lambda: torch.ones(1, 1).expand(64, 10**9),
            lambda: torch.empty(0, 2**40),
            lambda: torch.eye(3).to_sparse(),
            lambda: torch.ones(3, device="meta"),
            lambda: torch.ones(10**12, device="meta"),
            lambda: nn.Parameter(one),
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            lambda: OrderedDict(a=one),
            lambda: torch.Size((1, 2)),
            lambda: torch.float64,
            lambda: torch.device("cuda", 7),
            lambda: b"bytes",
            lambda: {1, 2},
            lambda: 1j,
        )
    )()


def saved(content: Any, zipped: bool = True) -> bytes:
    """What torch.save writes."""
    target = io.BytesIO()
    torch.save(content, target, _use_new_zipfile_serialization=zipped)
    return target.getvalue()


def damaged(content: Any, random: Random, legacy: bool = False) -> bytes:
    """A file with this content, or with another, in one piece or not."""
    kind = random.random()
    if kind < 0.4:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of quantized tensors, which torch will drop
            content = mutate_value(content, random, hostile_tensor)
            return saved(content, not (legacy and random.random() < 0.3))
    whole = saved(content)
    if kind < 0.75:
        return mutate_members(whole, random, {"data.pkl": mutate_pickle})
    if legacy and kind < 0.85:
        whole = saved(content, zipped=False)
    if random.random() < 0.3:
        return mutate_bytes(whole, random)
    # Most bytes are of weights, which may be anything.
    edge = random.choice((512, 3000))
    if random.random() < 0.5:
        return mutate_bytes(whole[:edge], random) + whole[edge:]
    return whole[:-edge] + mutate_bytes(whole[-edge:], random)


def _run() -> dict[str, Any]:
    """Contents of the files of a run, by name."""
    with tempfile.TemporaryDirectory() as folder:
        trained(CONFIG, Path(folder), (1,), DIGITS)
        return {
            name: torch.load(Path(folder, name), weights_only=True)
            for name in ("checkpoint.pt", "last.pt")
        }


def checkpoint() -> Format:
    """Of a run that is resumed, in its first epoch or in its layer-wise stage."""
    content = _run()["checkpoint.pt"]
    later = copy.deepcopy(content) | {"epochs_done": 2}

    def write(random: Random, folder: Path) -> None:
        chosen = random.choice((content, content, later))
        (folder / "checkpoint.pt").write_bytes(damaged(chosen, random))

    def read(folder: Path) -> None:
        trainer = Trainer(CONFIG, DIGITS, ALONE)
        directory = RunDirectory(folder)
        session.run(trainer, directory, Silent(), stop_after=0)
        if trainer.epochs_done < CONFIG.total_epochs:
            session.run(trainer, directory, Silent(), stop_after=trainer.epochs_done + 1)

    return Format(write, read)


def network() -> Format:
    """Of a run that is evaluated."""
    content = _run()["last.pt"]

    def write(random: Random, folder: Path) -> None:
        (folder / "config.toml").write_text(CONFIG.to_toml(), encoding="utf-8")
        (folder / "last.pt").write_bytes(damaged(content, random))

    def read(folder: Path) -> None:
        loaded, _ = loading.load_network(RunDirectory(folder), DIGITS, "last")
        examination.examine(loaded, DIGITS.x_test[:1], DIGITS.y_test[:1], EXAMINATION, 0)

    return Format(write, read)


def weights() -> Format:
    """A state_dict from elsewhere, of both of torch's formats."""
    made = _network()
    content = {"epoch": 3, "state_dict": made.state_dict()}

    def read(folder: Path) -> None:
        loaded = copy.deepcopy(made)
        outside.load_weights(loaded, folder / "weights.pth")
        outside.check_classifies(loaded, DIGITS)
        examination.examine(loaded, DIGITS.x_test[:1], DIGITS.y_test[:1], EXAMINATION, 0)

    return Format(_weights_of(content), read)


def _weights_of(content: dict[str, Any]) -> Write:
    def write(random: Random, folder: Path) -> None:
        chosen = random.choice((content, content["state_dict"]))
        (folder / "weights.pth").write_bytes(damaged(chosen, random, legacy=True))

    return write


def _network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("digits-cnn", (1, 8, 8), 10).eval()
