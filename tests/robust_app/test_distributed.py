"""Many processes reach what one reaches on the joined batch."""

import contextlib
import dataclasses
import io
import os
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from rich.console import Console

from robust_app import data, divergence
from robust_app.config import Config
from robust_app.distributed import OfOneProcess, ProcessLost, World, join
from robust_app.errors import UserError
from robust_app.methods import METHODS
from robust_app.reporting import Silent, watcher
from robust_app.run_directory import RunDirectory
from robust_app.session import run
from robust_app.training import Trainer
from robust_app.watching import Watcher
from tests.robust_app.runs import ALONE, SHI, Spoils, few_digits, full_strength, short_config


def certified_parameters(trainer: Trainer) -> torch.Tensor:
    """Of the network as it is saved, which has one form in all stages."""
    return torch.nn.utils.parameters_to_vector(trainer.certifiable().parameters()).detach()


def parallel_kinds() -> dict[str, Config]:
    """Runs of three epochs in which processes must agree on something of their own."""
    ramp = {"epochs": 3, "natural_epochs": 0.5, "ramp_epochs": 1.0, "learning_rate": 5e-3}
    kinds = {method: {"method": method} for method in METHODS if method != "latent-adversarial"}
    for name in ("diffai", "crown-ibp"):
        kinds[name] |= {"natural_weight": (0.5, 0.5)}
    kinds["crown-ibp"] |= {"crown_share": (1.0, 0.5)}
    kinds["advcrown-ibp"] |= {"crown_share": (1.0, 0.5)}
    kinds["batch norm"] = {"method": "ibp", **SHI}
    kinds["joint with batch norm"] = {"method": "advibp", **SHI}
    kinds["a frozen batch norm"] = {
        "method": "advibp",
        "first_batch_norm_frozen_from": 1.5,
        **SHI,
    }
    kinds["authors"] = {
        "method": "advibp",
        "certified_epochs": 1.0,
        "authors_weights": True,
        "one_start_per_batch": True,
    }
    later = {"epochs": 1, "ramp_epochs": 0.5, "natural_epochs": 0.0}
    stages = {"stages": 2, "stage_epochs": 1, "stage_learning_rate": 1e-3}
    kinds["stages"] = {"method": "advibp", **later, **stages}
    kinds["stages with batch norm"] = {"method": "advibp", **later, **stages, **SHI}
    kinds["stages after a frozen batch norm"] = kinds["stages with batch norm"] | {
        "epochs": 2,
        "first_batch_norm_frozen_from": 1.0,
    }
    kinds["latent-adversarial"] = {"method": "latent-adversarial", **later, **stages}
    return {name: full_strength(**(ramp | changes)) for name, changes in kinds.items()}


KINDS = parallel_kinds()
BF16 = dataclasses.replace(KINDS["joint with batch norm"], precision="bf16")


def trainer(kind: str, world: World) -> Trainer:
    """Of all digits through every phase, or of few digits in another way."""
    if kind == "digits":
        return Trainer(short_config(), data.load("digits"), world)
    return Trainer(BF16 if kind == "bf16" else KINDS[kind], few_digits(), world)


def outcome(trainer: Trainer, watch: Watcher) -> dict[str, Any]:
    """What a run begins with, ends with and says."""
    start = certified_parameters(trainer)
    metrics = [trainer.train_epoch(watch) for _ in range(trainer.config.total_epochs)]
    return {"start": start, "parameters": certified_parameters(trainer), "metrics": metrics}


PHASES = {"natural": {"natural_epochs": 3.0}, "main": {}}
SPOILED = {
    "natural": "the natural loss or its gradient is not finite",
    "main": "the adversarial and certified losses or their gradients are not finite",
}


def diverging(phase: str, world: World, folder: Path) -> dict[str, Any]:
    """A run that the last process alone spoils: what it ends with, and how it goes on."""
    config = full_strength("advibp", epochs=3, **PHASES[phase])
    directory = RunDirectory(folder / phase)
    directory.path.mkdir(exist_ok=True)
    found: dict[str, Any] = {}
    for on_divergence in divergence.CHOICES:
        made = Trainer(config, few_digits(), world)
        epoch = 2 if world.rank == world.size - 1 else 99
        spoils = Spoils(made, epoch, 1, limit=config.learning_rate / 3)
        try:
            run(made, directory, spoils, 3, on_divergence)
        except divergence.Diverged as error:
            found["told"] = str(error)
        else:
            found |= {"notes": spoils.notes, "scale": made.learning_rate_scale}
            found["parameters"] = certified_parameters(made)
    return found


def _train_in_parallel(rank: int, size: int, folder: Path, kinds: list[str]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text())
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in the process of the tests
    with join("cpu") as world:
        assert world.agree_on(3)
        assert not world.agree_on(rank)
        with world.leader_first():
            data.load("digits")
        reason = "missing" if world.leads else "process 0 failed"
        with pytest.raises(UserError, match=reason), world.leader_first():
            raise UserError("missing")  # none waits for one that has left, or tries it too
        for fault in (UserError("missing"), OSError("missing")):
            with contextlib.ExitStack() as stack:
                if not world.leads:
                    told = f"^process {rank}: missing$"
                    stack.enter_context(pytest.raises(OfOneProcess, match=told))
                with world.leader_first():
                    if not world.leads:
                        raise fault
        found = {}
        for kind in kinds:
            made = trainer(kind, world)
            # The leader watches at moments of its own: it may not wait for the others then.
            terminal = Console(file=io.StringIO(), force_terminal=world.leads)
            with watcher(terminal, made.config.total_epochs) as watch:
                found[kind] = outcome(made, watch)
        if size == 2:
            found["diverging"] = {phase: diverging(phase, world, folder) for phase in PHASES}
        torch.save(found, folder / f"{rank}.pt")


def trained_by_processes(size: int, folder: Path, kinds: list[str]) -> list[dict[str, Any]]:
    """The outcome of each kind of run, from each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(probe.getsockname()[1]))
    context = torch.multiprocessing.spawn(
        _train_in_parallel, (size, folder, kinds), nprocs=size, join=False
    )
    deadline = time.monotonic() + 300
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def assert_as_alone(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """The processes agree to the bit, and with a single one up to rounding."""
    for rank in ranks[1:]:
        assert torch.equal(rank["parameters"], ranks[0]["parameters"])
    # By length: Adam turns rounding of a gradient near 0 into a whole step of single entries.
    travelled = (alone["parameters"] - alone["start"]).norm()
    assert travelled > 0
    assert (ranks[0]["parameters"] - alone["parameters"]).norm() < 1e-3 * travelled
    for one, together in zip(alone["metrics"], ranks[0]["metrics"], strict=True):
        assert one.keys() == together.keys()
        assert (one["phase"], one["stage"]) == (together["phase"], together["stage"])
        for key in one.keys() - {"seconds", "phase"}:
            assert together[key] == pytest.approx(one[key], rel=5e-3, abs=1e-3), key


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All kinds of runs, by two processes that are started once."""
    return trained_by_processes(2, tmp_path_factory.mktemp("two"), ["digits", "bf16", *KINDS])


@pytest.mark.parametrize("kind", ["digits", *KINDS])
def test_two_processes_train_as_one_does(kind, two_processes):
    assert_as_alone([rank[kind] for rank in two_processes], outcome(trainer(kind, ALONE), Silent()))


def test_two_processes_train_nearly_as_one_does_with_bf16(two_processes):
    """It rounds each half of a batch for itself; with float32 one of these is 7 % off."""
    ranks, alone = (
        [rank["bf16"] for rank in two_processes],
        outcome(trainer("bf16", ALONE), Silent()),
    )
    assert torch.equal(ranks[1]["parameters"], ranks[0]["parameters"])
    for one, together in zip(alone["metrics"], ranks[0]["metrics"], strict=True):
        for key in ("adversarial_loss", "certified_loss"):
            assert together[key] == pytest.approx(one[key], rel=0.03)


@pytest.mark.parametrize("phase", PHASES)
def test_what_explodes_in_one_process_is_told_alike_by_all_and_they_go_on_together(
    two_processes, phase
):
    for found in (rank["diverging"][phase] for rank in two_processes):
        where = f"epoch 2, batch 2: {SPOILED[phase]}"
        assert found["told"].startswith(f"training diverged in {where}; the checkpoint before")
        assert found["notes"] == [
            f"training diverged in {where}; it goes on after epoch 1 at {scale} of the "
            "learning rate"
            for scale in (0.5, 0.25)
        ]
        assert found["scale"] == 0.25
    assert torch.equal(*(rank["diverging"][phase]["parameters"] for rank in two_processes))


@pytest.mark.slow
def test_three_processes_train_as_one_does(tmp_path):
    ranks = trained_by_processes(3, tmp_path, ["digits"])
    alone = outcome(trainer("digits", ALONE), Silent())
    assert_as_alone([rank["digits"] for rank in ranks], alone)


PARTNER = """
import os, time, torch.distributed
print("ready", flush=True)
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
{end}
"""


def wait_for(patience: timedelta) -> None:
    with join("cpu", patience) as world:
        torch.distributed.barrier()
        world.total(torch.ones(3))


@pytest.mark.parametrize("end", ["os._exit(1)", "time.sleep(600)"], ids=["dead", "silent"])
def test_a_process_that_is_lost_is_told_in_one_line(monkeypatch, end):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", PARTNER.format(end=end)]
    patience = timedelta(seconds=5 if "sleep" in end else 600)
    with subprocess.Popen(
        command, env=os.environ | {"RANK": "1"}, stdout=subprocess.PIPE, text=True
    ) as partner:
        assert partner.stdout is not None
        assert partner.stdout.readline() == "ready\n"
        try:
            with pytest.raises(ProcessLost, match=r"^process 0 of 2 cannot go on: [^\n]*$"):
                wait_for(patience)
        finally:
            partner.kill()
