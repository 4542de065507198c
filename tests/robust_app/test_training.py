"""The loop: determinism, resuming, divergence, and what a Config changes."""

import math

import pytest
import torch

from robust_app import batch_norm, checkpoint, data, training
from robust_app.batch_norm import BatchNorm
from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.loading import load_network
from robust_app.metrics import best_epoch
from robust_app.overrides import override
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.schedules import Phase
from robust_app.session import run
from robust_app.training import Trainer
from tests.robust_app.runs import (
    ALONE,
    SHI,
    assert_same_files,
    few_digits,
    full_strength,
    parameters_of,
    short_config,
    trained,
)


def test_every_phase_is_passed_and_reported(tmp_path):
    trained(short_config(), tmp_path)
    metrics = RunDirectory(tmp_path).metrics()

    assert [epoch["epoch"] for epoch in metrics] == [1, 2, 3]
    assert metrics[0]["phase"] == Phase.ADVERSARIAL.value
    assert {"natural_loss", "adversarial_loss"} <= metrics[0].keys()
    assert metrics[0]["epsilon"] == pytest.approx(0.1)
    last = metrics[-1]
    assert (last["phase"], last["stage"]) == ("main", 0)
    assert last["epsilon"] == pytest.approx(0.1)
    assert last["adversarial_loss"] < last["certified_loss"]
    assert 0 <= last["certified_first"] <= last["conflicts"] <= 1
    assert last["learning_rate"] == pytest.approx(metrics[0]["learning_rate"] * 0.2)
    assert 0 <= last["standard_error"] <= last["verified_error"] <= 100


def test_the_mean_cosine_of_the_moments_is_reported():
    trainer = Trainer(full_strength("advibp", epochs=2), few_digits(), ALONE)
    cosines = []

    class Collector(Silent):
        def batch(self, *_):
            cosines.append(trainer.optimizer.last.cosines[0, 1].item())

    for _ in range(2):
        cosines.clear()
        reported = trainer.train_epoch(Collector())["cosine"]
        assert len(cosines) == 3
        assert reported == pytest.approx(sum(cosines) / 3)
    assert 0 < abs(reported) < 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    first, second = (trained(short_config(), tmp_path / name) for name in "ab")
    other = trained(short_config(seed=1), tmp_path / "c")

    assert torch.equal(parameters_of(first), parameters_of(second))
    assert not torch.equal(parameters_of(first), parameters_of(other))


def test_a_run_resumed_twice_ends_in_the_bits_of_an_unbroken_one(tmp_path):
    unbroken = trained(short_config(), tmp_path / "unbroken")
    resumed = trained(short_config(), tmp_path / "resumed", stops=(1, 2, 3))

    assert torch.equal(parameters_of(unbroken), parameters_of(resumed))
    assert_same_files(tmp_path / "unbroken", tmp_path / "resumed")


def test_metrics_written_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    trained(short_config(), tmp_path, stops=(1,))
    files = RunDirectory(tmp_path)
    files.write_metrics([*files.metrics(), files.metrics()[0] | {"epoch": 2, "phase": "half done"}])

    trained(short_config(), tmp_path, stops=(2,))

    assert [epoch["epoch"] for epoch in files.metrics()] == [1, 2]
    assert files.metrics()[1]["phase"] == "main"


def test_methods_differ_only_where_both_losses_are_weighed(tmp_path):
    only_warm_up = {"natural_epochs": 1.5, "adversarial_epochs": 1.5, "ramp_epochs": 0.0}
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
    told = r"diverged in epoch 1, batch 2: the (natural|adversarial) loss or its gradient is not"
    with pytest.raises(UserError, match=told):
        trained(config, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epochs_done"] == 0


def test_divergence_in_the_joint_phase_names_the_batch_and_the_loss(tmp_path):
    config = short_config(natural_epochs=0.0, adversarial_epochs=0.0, learning_rate=1e30)
    with pytest.raises(UserError, match=r"epoch 1, batch 2: the adversarial( and certified)? loss"):
        trained(config, tmp_path)


def test_the_best_epoch_is_chosen_by_held_out_verified_then_standard_error():
    def epoch(number: int, verified: float | None, standard: float) -> dict[str, object]:
        return {"epoch": number, "verified_error": verified, "standard_error": standard}

    assert best_epoch([epoch(1, 9.0, 3.0), epoch(2, 8.0, 5.0), epoch(3, 8.0, 4.0)]) == 3
    assert best_epoch([epoch(1, None, 3.0)]) is None
    assert best_epoch([]) is None


def test_nothing_held_out_leaves_no_best_model(tmp_path):
    trained(short_config(held_out=0), tmp_path, stops=(1,))
    assert not (tmp_path / "best.pt").exists()
    assert (tmp_path / "last.pt").exists()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trained(short_config(), tmp_path, stops=(1,))
    other, file = short_config(model="dm-small"), tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match=r"made with another .*\(model: digits-cnn, not dm-small"):
        trained(other, tmp_path, stops=(2,))
    checkpoint.save(checkpoint.load(file) | {"config": other.to_toml()}, file)
    with pytest.raises(UserError, match=r"checkpoint\.pt: does not fit this run \(.*size mismatch"):
        trained(other, tmp_path, stops=(2,))


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


def test_the_authors_schedule_ramps_the_certified_loss_alone_and_weighs_by_the_first_layer(
    tmp_path,
):
    config = full_strength(
        "advibp",
        epochs=4,
        natural_epochs=1.0,
        ramp_epochs=1.5,
        certified_epochs=1.5,
        authors_weights=True,
    )
    trainer = trained(config, tmp_path, (4,), few_digits())
    metrics = RunDirectory(tmp_path).metrics()
    assert [epoch["phase"] for epoch in metrics] == ["natural", "certified", "main", "main"]
    reported = [{key for key in epoch if key.endswith("_loss")} for epoch in metrics]
    assert reported[:2] == [{"natural_loss"}, {"certified_loss"}]
    assert reported[3] == {"adversarial_loss", "certified_loss"}
    moments = trainer.optimizer.state_dict()["moments"]["exp_avg"]
    weight = trainer.network[0].weight
    assert {position: tuple(m.shape) for position, m in moments.items()} == {0: (2, *weight.shape)}


@pytest.mark.parametrize("one", [True, False])
def test_a_random_start_is_one_number_for_the_batch_or_one_for_each_pixel(one):
    """A step that moves nothing leaves the start to be seen."""
    config = full_strength("fgsm-random", attack_step=1e-6, one_start_per_batch=one)
    trainer = Trainer(config, few_digits(), ALONE)
    trainer.train_epoch(Silent())
    seen = trainer.stage.losses.stationarity
    inside = (seen.x > 0.03) & (seen.x < 0.97)
    starts = ((seen.x_adv.detach() - seen.x) / 0.03)[inside]
    assert (starts.std() < 1e-3) == one
    assert starts.abs().max() <= 1 + 1e-4


def test_shi_et_als_training_starts_from_their_weights_and_saves_no_batch_norm(tmp_path):
    few = few_digits()
    config = full_strength("ibp", natural_epochs=1.0, ramp_epochs=3.0, **SHI)
    plain = full_strength("ibp", batch_norm=True)
    assert not torch.equal(*(parameters_of(Trainer(c, few, ALONE)) for c in (config, plain)))
    trainer = trained(config, tmp_path, (6,), few)
    assert sum(isinstance(layer, BatchNorm) for layer in trainer.network) == 3
    # Its statistics are those of all training images, by the last weights.
    convolution, norm, *_ = trainer.network
    with torch.no_grad():
        of_all = convolution(trainer.x.float() / 255)
    torch.testing.assert_close(norm.running_mean, of_all.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, of_all.var((0, 2, 3), correction=0))

    directory = RunDirectory(tmp_path)
    directory.config_file.write_text(config.to_toml())
    network, _ = load_network(directory, few, "last")
    assert not any(isinstance(layer, BatchNorm) for layer in network)
    x = few.x_test[:20].float() / 255
    with torch.no_grad():
        expected = trainer.network.eval()(x)
    torch.testing.assert_close(network(x).detach(), expected, rtol=1e-3, atol=1e-4)


def test_the_first_batch_norm_keeps_its_statistics_from_the_time_that_is_set_on():
    few, first = few_digits(), ("1.running_mean", "1.running_var")
    never, frozen = (
        Trainer(full_strength("advibp", first_batch_norm_frozen_from=t, **SHI), few, ALONE)
        for t in (math.inf, 1.0)
    )
    for trainer in (never, frozen):
        trainer.train_epoch(Silent())
    assert torch.equal(parameters_of(never), parameters_of(frozen))
    before = {name: value.clone() for name, value in frozen.network.state_dict().items()}
    for trainer in (never, frozen):
        trainer.train_epoch(Silent())
    after = frozen.network.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == set(first)
    assert not any(torch.equal(never.network.state_dict()[name], after[name]) for name in first)
    assert not torch.equal(parameters_of(never), parameters_of(frozen))


def test_a_run_with_a_frozen_batch_norm_resumes_to_the_same_bits(tmp_path):
    config, few = full_strength("advibp", first_batch_norm_frozen_from=1.5, **SHI), few_digits()
    unbroken = trained(config, tmp_path / "unbroken", (4,), few)
    resumed = trained(config, tmp_path / "resumed", (1, 2, 3, 4), few)
    assert torch.equal(parameters_of(unbroken), parameters_of(resumed))
    assert_same_files(tmp_path / "unbroken", tmp_path / "resumed")


def test_box_regularizers_change_the_ramp_and_nothing_after_it(tmp_path):
    few = few_digits()
    runs = [
        trained(full_strength("ibp", ramp_epochs=ramp, box_regularizers=weight), folder, (2,), few)
        for ramp, weight, folder in (
            (0.0, 0.0, tmp_path / "a"),
            (0.0, 0.5, tmp_path / "b"),
            (2.0, 0.0, tmp_path / "c"),
            (2.0, 0.5, tmp_path / "d"),
        )
    ]
    at_once, at_once_with, ramped, ramped_with = map(parameters_of, runs)
    assert torch.equal(at_once, at_once_with)
    assert not torch.equal(ramped, ramped_with)


def test_overrides_reach_the_trainer():
    config = override(short_config(), ["moment_decay=[0.5, 0.6]", "learning_rate=0.01"])
    trainer = Trainer(config, data.load("digits"), ALONE)
    assert trainer.optimizer.moment_decay == (0.5, 0.6)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    config = short_config(natural_epochs=3.0, adversarial_epochs=0.0, ramp_epochs=0.0)
    trainer = Trainer(config, data.load("digits"), ALONE)

    class Spoils(Silent):
        def batch(self, epoch, batch, batches, now, means):
            if batch == batches:
                trainer.network[-1].weight.data[0, 0] = float("nan")

    files = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"diverged in epoch 1: a mean loss, a parameter,"):
        run(trainer, files, Spoils(), 3)
    assert checkpoint.load(files.checkpoint_file)["epochs_done"] == 0


def test_statistics_are_estimated_over_whole_batches(monkeypatch):
    """Else processes would have unequal shares, and one image alone has no variance."""
    monkeypatch.setattr(training, "CHUNK", 40)
    config = short_config(batch_norm=True, batch_size=16, held_out=1437 - 97)
    trainer = Trainer(config, data.load("digits"), ALONE)
    seen = []
    estimate = batch_norm.estimate
    monkeypatch.setattr(
        batch_norm, "estimate", lambda network, parts: estimate(network, map(seen_of(seen), parts))
    )
    trainer.train_epoch(Silent())
    assert seen == [32, 32, 32]  # the 97th image is left out


def seen_of(seen):
    def look(part):
        seen.append(len(part))
        return part

    return look


def test_a_checkpoint_of_a_gpu_goes_on_without_one():
    """Whose optimizer was of another implementation and kept its learning rate on the device."""
    config = full_strength("advibp", epochs=2)
    first, second, unbroken = (Trainer(config, few_digits(), ALONE) for _ in range(3))
    first.train_epoch(Silent())
    state = first.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group |= {"fused": True, "capturable": True, "lr": torch.tensor(1.0)}
        del group["multiplier"]  # an older checkpoint has none
    second.load_state_dict(state)
    second.train_epoch(Silent())
    for _ in range(2):
        unbroken.train_epoch(Silent())
    assert torch.equal(parameters_of(second), parameters_of(unbroken))
