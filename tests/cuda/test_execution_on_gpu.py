"""Training on a GPU: nothing waits inside an epoch, and captured steps are eager ones."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from robust_app.capture import Captured
from robust_app.distributed import World, join
from robust_app.errors import UserError
from robust_app.evaluation import standard_and_certified
from robust_app.execution import Compiled, Eager
from robust_app.folding import fold
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.session import run
from robust_app.training import Trainer
from tests.robust_app.runs import (
    AUGMENTED,
    SHI,
    changing_runs,
    few_digits,
    full_strength,
    parameters_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHANGING = changing_runs(batch_size=8)  # ten steps an epoch: each structure is captured


@pytest.fixture
def gpu() -> Iterator[World]:
    with join("cuda") as world:
        yield world
    if torch.cuda.get_sync_debug_mode():  # to set it warns, the first time in a process
        torch.cuda.set_sync_debug_mode("default")


def trainer_of(config, world: World, kind: type[Eager] = Eager) -> Trainer:
    return Trainer(config, few_digits().to(world.device), world, kind)


class Waiting(Silent):
    """Allows waiting for the device again once the last step of an epoch is under way."""

    def batch(self, epoch, batch, batches, now, means) -> None:
        assert means.sums == {}  # nothing to read for whoever watches
        if batch == batches:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kind", [Eager, Captured])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "advibp"},
        {"method": "advibp", **AUGMENTED, **SHI},
        {"method": "advcrown-ibp", "crown_share": (0.5, 0.5)},
        {"method": "crown-ibp", "crown_share": (0.5, 0.5), "precision": "bf16"},
        {"method": "pgd", "precision": "tf32", "gradient_clip": math.inf},
    ],
    ids=["joint", "batch norm", "crown", "mixed bf16", "adversarial tf32"],
)
def test_an_epoch_does_not_wait(gpu, kind, changes):
    trainer = trainer_of(full_strength(**changes), gpu, kind)
    for _ in range(2):  # what is made once is made, and a step captured
        trainer.train_epoch(Silent())
    torch.cuda.set_sync_debug_mode("error")
    trainer.train_epoch(Waiting())


@pytest.mark.parametrize("name", CHANGING)
def test_captured_steps_train_as_eager_ones_do(gpu, name):
    config = CHANGING[name]
    eager, captured = (trainer_of(config, gpu, kind) for kind in (Eager, Captured))
    start = parameters_of(eager).clone()
    metrics = [[trainer.train_epoch(Silent()) for _ in range(3)] for trainer in (eager, captured)]
    assert captured.run_step._replay is not None
    travelled = (parameters_of(eager) - start).norm()
    assert (parameters_of(captured) - parameters_of(eager)).norm() < 2e-2 * travelled
    for one, other in zip(*metrics, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "phase"}:
            assert other[key] == pytest.approx(one[key], rel=2e-2, abs=2e-3), key


def resumed(
    config, folder: Path, world: World, kinds: list[type[Eager]], stops: list[int]
) -> Trainer:
    """A run that is stopped and goes on in a directory, each time by another execution."""
    files = RunDirectory(folder)
    files.path.mkdir(parents=True)
    for kind, stop in zip(kinds, stops, strict=True):
        trainer = trainer_of(config, world, kind)
        run(trainer, files, Silent(), stop)
    return trainer


@pytest.mark.parametrize(
    "kinds", [[Captured, Captured], [Eager, Captured], [Captured, Eager]], ids=str
)
def test_a_captured_run_survives_its_checkpoint(gpu, tmp_path, kinds):
    config = CHANGING["joint with batch norm"]
    unbroken = resumed(config, tmp_path / "unbroken", gpu, [Eager], [3])
    broken = resumed(config, tmp_path / "broken", gpu, kinds, [1, 3])
    start = parameters_of(trainer_of(config, gpu))
    travelled = (parameters_of(unbroken) - start).norm()
    assert (parameters_of(broken) - parameters_of(unbroken)).norm() < 2e-2 * travelled
    groups = broken.optimizer.param_groups
    assert {group["capturable"] for group in groups} == {kinds[-1] is Captured}


def test_a_run_moves_between_the_processor_and_the_gpu(gpu):
    config = full_strength("advibp", epochs=2)
    cpu = World(0, 1, torch.device("cpu"))
    for here, there in ((cpu, gpu), (gpu, cpu)):
        first, second = trainer_of(config, here), trainer_of(config, there)
        first.train_epoch(Silent())
        second.load_state_dict(first.state_dict())
        second.train_epoch(Silent())
        assert {parameter.device.type for parameter in second.network.parameters()} == {
            there.device.type
        }


@pytest.mark.parametrize("kind", [Eager, Captured])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_fewer_digits_train_and_are_never_measured_with(gpu, kind, precision):
    config = full_strength("advibp", precision=precision, **SHI)
    trainer = trainer_of(config, gpu, kind)
    metrics = [trainer.train_epoch(Silent()) for _ in range(6)]
    for name in ("adversarial_loss", "certified_loss"):
        assert metrics[-1][name] < metrics[0][name]
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    x, labels = trainer.held_out_x, trainer.held_out_labels
    counts = standard_and_certified(
        trainer.certifiable().cpu(), x.cpu(), labels.cpu(), config.evaluation_epsilon
    )
    wrong, proved = counts.tolist()
    # The same to an image that rounding in another order decides.
    assert abs(metrics[-1]["standard_error"] - 100 * wrong / len(x)) <= 100 / len(x) + 1e-6
    assert abs(metrics[-1]["verified_error"] - 100 * (1 - proved / len(x))) <= 100 / len(x) + 1e-6


@pytest.mark.parametrize("method", ["natural", "advibp"])
def test_divergence_is_told_at_the_end_of_the_epoch(gpu, method):
    config = full_strength(method, learning_rate=1e30, gradient_clip=math.inf)
    trainer = trainer_of(config, gpu)
    with pytest.raises(UserError, match=r"training diverged in epoch 1, batch \d+: "):
        trainer.train_epoch(Silent())


def test_layer_wise_stages_are_captured_too(gpu):
    stages = {"stages": 2, "stage_epochs": 2, "stage_learning_rate": 1e-3}
    config = full_strength("advibp", epochs=2, batch_size=16, **SHI, **stages)
    eager, captured = (trainer_of(config, gpu, kind) for kind in (Eager, Captured))
    start = parameters_to_vector(fold(eager.network).parameters()).detach()  # as stages have it
    for trainer in (eager, captured):
        metrics = [trainer.train_epoch(Silent()) for _ in range(config.total_epochs)]
        assert [epoch["stage"] for epoch in metrics] == [0, 0, 1, 1, 2, 2]
    travelled = (parameters_of(eager) - start).norm()
    assert (parameters_of(captured) - parameters_of(eager)).norm() < 2e-2 * travelled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["advibp", "joint with batch norm", "advcrown-ibp"])
def test_compiled_losses_train_as_eager_ones_do(gpu, name):
    config = dataclasses.replace(CHANGING[name], seed=1)
    eager, compiled = (trainer_of(config, gpu, kind) for kind in (Eager, Compiled))
    start = parameters_of(eager).clone()
    for trainer in (eager, compiled):
        for _ in range(3):
            trainer.train_epoch(Silent())
    travelled = (parameters_of(eager) - start).norm()
    assert (parameters_of(compiled) - parameters_of(eager)).norm() < 2e-2 * travelled
