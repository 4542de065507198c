"""The loop: determinism, resuming, many processes, divergence."""

import dataclasses
import io
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from rich.console import Console

from robust_app import checkpoint, data
from robust_app.config import Config, load_recipe, override
from robust_app.distributed import World, join
from robust_app.errors import UserError
from robust_app.reporting import Silent, watcher
from robust_app.run_directory import RunDirectory
from robust_app.schedules import Phase
from robust_app.session import best_epoch, run
from robust_app.training import Trainer

ALONE = World(0, 1, torch.device("cpu"))


def short_config(**changes: object) -> Config:
    """Three epochs on the digits that pass through every phase, ε included."""
    schedule = {"epochs": 3, "natural_epochs": 0.5, "adversarial_epochs": 0.5, "ramp_epochs": 1.0}
    small = {"batch_size": 96, "held_out": 141, "fosc_decay_epochs": 0.5, "milestones": (2.0,)}
    return dataclasses.replace(load_recipe("digits"), **(schedule | small | changes))


def trained(config: Config, directory: Path, stops: tuple[int, ...] = (3,)) -> Trainer:
    """Train in a directory, with a fresh process's worth of objects after each stop."""
    files = RunDirectory(directory)
    files.path.mkdir(parents=True, exist_ok=True)
    for stop in stops:
        trainer = Trainer(config, data.load("digits"), ALONE)
        run(trainer, files, Silent(), stop)
    return trainer


def parameters_of(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.network.parameters()).detach()


def test_every_phase_is_passed_and_reported(tmp_path):
    trained(short_config(), tmp_path)
    metrics = RunDirectory(tmp_path).metrics()

    assert [epoch["epoch"] for epoch in metrics] == [1, 2, 3]
    assert metrics[0]["phase"] == Phase.ADVERSARIAL.value
    assert {"natural_loss", "adversarial_loss"} <= metrics[0].keys()
    assert metrics[0]["epsilon"] == pytest.approx(0.1)
    last = metrics[-1]
    assert last["phase"] == "joint"
    assert last["epsilon"] == pytest.approx(0.1)
    assert last["adversarial_loss"] < last["certified_loss"]
    assert 0 <= last["certified_first"] <= last["conflicts"] <= 1
    assert last["learning_rate"] == pytest.approx(metrics[0]["learning_rate"] * 0.2)
    assert 0 <= last["standard_error"] <= last["verified_error"] <= 100


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    first, second = (trained(short_config(), tmp_path / name) for name in "ab")
    other = trained(short_config(seed=1), tmp_path / "c")

    assert torch.equal(parameters_of(first), parameters_of(second))
    assert not torch.equal(parameters_of(first), parameters_of(other))


def test_a_run_resumed_twice_ends_in_the_bits_of_an_unbroken_one(tmp_path):
    unbroken = trained(short_config(), tmp_path / "unbroken")
    resumed = trained(short_config(), tmp_path / "resumed", stops=(1, 2, 3))

    assert torch.equal(parameters_of(unbroken), parameters_of(resumed))
    for name in ("best.pt", "last.pt"):
        one, other = (checkpoint.load(tmp_path / run / name) for run in ("unbroken", "resumed"))
        assert one["epoch"] == other["epoch"]
        for key, value in one["network"].items():
            assert torch.equal(value, other["network"][key])
    first, second = (
        [{**epoch, "seconds": 0} for epoch in RunDirectory(tmp_path / name).metrics()]
        for name in ("unbroken", "resumed")
    )
    assert first == second


def test_metrics_written_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    trained(short_config(), tmp_path, stops=(1,))
    files = RunDirectory(tmp_path)
    files.write_metrics([*files.metrics(), {"epoch": 2, "half": "done"}])

    trained(short_config(), tmp_path, stops=(2,))

    assert [set(epoch) >= {"phase", "seconds"} for epoch in files.metrics()] == [True, True]


def test_methods_differ_only_where_both_losses_are_weighed(tmp_path):
    only_warm_up = {"natural_epochs": 1.5, "adversarial_epochs": 1.5}
    runs = {
        (method, name): trained(short_config(method=method, **changes), tmp_path / method / name)
        for method in ("advibp", "weighted-sum")
        for name, changes in (("joint", {}), ("warm-up", only_warm_up))
    }

    def same(name: str) -> bool:
        one, other = (parameters_of(runs[method, name]) for method in ("advibp", "weighted-sum"))
        return torch.equal(one, other)

    assert same("warm-up")
    assert not same("joint")


def test_divergence_is_told_with_epoch_and_cause_and_keeps_the_checkpoint(tmp_path):
    config = short_config(learning_rate=1e30, gradient_clip=float("inf"))
    with pytest.raises(UserError, match=r"training diverged in epoch 1"):
        trained(config, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epochs_done"] == 0


def test_divergence_in_the_joint_phase_names_the_batch_and_the_loss(tmp_path):
    config = short_config(natural_epochs=0.0, adversarial_epochs=0.0, learning_rate=1e30)
    with pytest.raises(UserError, match=r"epoch 1, batch 2: not finite: losses\[0\]"):
        trained(config, tmp_path)


def test_the_best_epoch_is_chosen_by_held_out_verified_then_standard_error():
    def epoch(number: int, verified: float | None, standard: float) -> dict[str, object]:
        return {"epoch": number, "verified_error": verified, "standard_error": standard}

    assert best_epoch([epoch(1, 9.0, 3.0), epoch(2, 8.0, 5.0), epoch(3, 8.0, 4.0)]) == 3
    assert best_epoch([epoch(1, None, 3.0)]) is None
    assert best_epoch([]) is None


def test_nothing_held_out_leaves_no_best_model(tmp_path):
    trained(short_config(held_out=0, epochs=1), tmp_path, stops=(1,))
    assert not (tmp_path / "best.pt").exists()
    assert (tmp_path / "last.pt").exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trained(short_config(), tmp_path, stops=(1,))
    with pytest.raises(UserError, match=r"checkpoint\.pt: holds another network"):
        trained(short_config(model="dm-small"), tmp_path, stops=(2,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2000}, "batch_size: expected at most the 1296 training images, found 2000"),
        ({"model": "dm-smal"}, "dm-small"),
        ({"method": "advipb"}, "advibp"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(short_config(**changes), data.load("digits"), ALONE)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size: expected a multiple of the 5 processes"):
        Trainer(short_config(), data.load("digits"), World(0, 5, torch.device("cpu")))


def _train_in_parallel(rank: int, size: int, folder: Path) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text())
    torch.set_num_threads(1)
    with join("cpu") as world:
        assert world.agree_on(3)
        assert not world.agree_on(rank)
        with world.leader_first():
            digits = data.load("digits")
        trainer = Trainer(short_config(), digits, world)
        # The leader watches at moments of its own: it may not wait for the others then.
        terminal = Console(file=io.StringIO(), force_terminal=world.leads)
        with watcher(terminal, 3) as watch:
            metrics = [trainer.train_epoch(watch) for _ in range(3)]
        torch.save(
            {"parameters": parameters_of(trainer), "metrics": metrics}, folder / f"{rank}.pt"
        )


@pytest.mark.parametrize("size", [2, 3])
def test_processes_reach_the_parameters_of_one_on_the_joined_batch(size, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    context = torch.multiprocessing.spawn(
        _train_in_parallel, (size, tmp_path), nprocs=size, join=False
    )
    deadline = time.monotonic() + 300
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    alone = Trainer(short_config(), data.load("digits"), ALONE)
    metrics = [alone.train_epoch(Silent()) for _ in range(3)]

    for rank in ranks[1:]:
        assert torch.equal(rank["parameters"], ranks[0]["parameters"])
    # By length: Adam turns rounding of a gradient near 0 into a whole step of single entries.
    start = parameters_of(Trainer(short_config(), data.load("digits"), ALONE))
    travelled = (parameters_of(alone) - start).norm()
    assert (ranks[0]["parameters"] - parameters_of(alone)).norm() < 1e-3 * travelled
    for one, together in zip(metrics, ranks[0]["metrics"], strict=True):
        assert one.keys() == together.keys()
        assert one["phase"] == together["phase"]
        for key in one.keys() - {"seconds", "phase"}:
            assert together[key] == pytest.approx(one[key], rel=5e-3, abs=1e-3), key


def test_overrides_reach_the_trainer():
    config = override(short_config(), ["moment_decay=[0.5, 0.6]", "learning_rate=0.01"])
    trainer = Trainer(config, data.load("digits"), ALONE)
    assert trainer.optimizer.moment_decay == (0.5, 0.6)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    config = short_config(natural_epochs=3.0, adversarial_epochs=0.0)
    trainer = Trainer(config, data.load("digits"), ALONE)

    class Spoils(Silent):
        def batch(self, epoch, batch, batches, now, means):
            if batch == batches:
                trainer.network[-1].weight.data[0, 0] = float("nan")

    files = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"diverged in epoch 1: a mean loss or a parameter"):
        run(trainer, files, Spoils(), 3)
    assert checkpoint.load(files.checkpoint_file)["epochs_done"] == 0
