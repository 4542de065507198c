"""Runs whose numbers explode: what they say, what they keep, and how they go on."""

import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_app import checkpoint, data, divergence
from robust_app.divergence import LOWER, Diverged, FirstFault
from robust_app.errors import UserError
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.session import run
from robust_app.training import Trainer
from tests.robust_app.refusals import assert_refused
from tests.robust_app.runs import (
    ALONE,
    SHI,
    Spoils,
    assert_same_files,
    few_digits,
    full_strength,
    parameters_of,
    short_config,
)

STAGES = {"stages": 1, "stage_epochs": 2, "stage_learning_rate": 1e-3}


def spoiled(config, folder, *where, stops=(6,), on_divergence=LOWER, **options):
    """A run on few digits, started anew after each stop, with who spoiled its last start."""
    directory = RunDirectory(folder)
    directory.path.mkdir(parents=True, exist_ok=True)
    for stop in stops:
        trainer = Trainer(config, few_digits(), ALONE)
        spoiler = Spoils(trainer, *where, **options)
        run(trainer, directory, spoiler, stop, on_divergence)
    return trainer, spoiler


# --- Where it happened


steps = st.lists(st.lists(st.booleans(), min_size=2, max_size=2), max_size=8)


@given(steps, st.sampled_from([1, 2]), st.booleans())
def test_the_first_fault_is_found_and_later_ones_are_not(finite, losses, again):
    faults = FirstFault(2, torch.device("cpu"))
    if again:  # what was before an epoch does not count
        faults.note(torch.tensor([False, True]))
        faults.forget()
    for step in finite:
        faults.note(torch.tensor(step[:losses]))
    bad = [number for number, step in enumerate(finite, 1) if not all(step[:losses])]
    if not bad:
        assert faults.found() is None
    else:
        step = finite[bad[0] - 1][:losses]
        assert faults.found() == (bad[0], [k for k, sound in enumerate(step) if not sound])


PHASES = {
    "natural": ({"natural_epochs": 6.0}, ["natural"]),
    "adversarial": ({"adversarial_epochs": 6.0}, ["adversarial"]),
    "certified": ({"certified_epochs": 6.0}, ["certified"]),
    "main": ({}, ["adversarial", "certified"]),
    "mixed": ({"method": "ibp"}, ["mixed"]),
}


@pytest.mark.parametrize("clip", [10.0, math.inf])
@pytest.mark.parametrize("kind", PHASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_epoch_batch_and_loss_are_named_and_the_parameters_stay(tmp_path, kind, clip, value):
    changes, names = PHASES[kind]
    config = full_strength(**({"method": "advibp", "gradient_clip": clip} | changes))
    trainer = Trainer(config, few_digits(), ALONE)
    seen = []

    class Watches(Spoils):
        def batch(self, epoch, batch, batches, now, means):
            super().batch(epoch, batch, batches, now, means)
            seen.append((epoch + 1, batch))

    with pytest.raises(Diverged) as told:
        run(trainer, RunDirectory(tmp_path), Watches(trainer, 2, 1, value), 6)
    assert told.value.where == f"epoch 2, batch 2: {divergence.described(names)}"
    assert seen[-1] == (2, 1)  # at once, not after the epoch
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epochs_done"] == 1


def test_a_loss_that_is_not_finite_is_noticed_by_a_gradient_that_would_be():
    trainer = Trainer(full_strength("natural"), few_digits(), ALONE)
    trainer.stage._single_backward("natural", trainer.network[0].weight.sum() + math.inf)
    assert trainer.stage.faults.found() == (1, [0])


def test_a_large_gradient_is_finite():
    trainer = Trainer(full_strength("natural"), few_digits(), ALONE)
    trainer.stage._single_backward("natural", 1e30 * trainer.network[0].weight.sum())
    assert trainer.stage.faults.found() is None


@pytest.mark.parametrize("what", ["parameter", "output", "state"])
def test_what_the_last_batch_leaves_is_looked_at_before_it_is_saved(tmp_path, what):
    trainer = Trainer(full_strength("advibp"), few_digits(), ALONE)

    class Last(Silent):
        def batch(self, epoch, batch, batches, now, means):
            weights = [layer.weight for layer in trainer.network if hasattr(layer, "weight")]
            if batch < batches:
                return
            if what == "parameter":
                weights[-1].data[0, 0] = math.inf
            elif what == "output":
                for weight in weights:  # finite, and of no use
                    weight.data.fill_(1e30)
            else:
                trainer.optimizer.state[weights[0]]["exp_avg_sq"].fill_(math.inf)

    with pytest.raises(Diverged, match=r"epoch 1: a mean loss, a parameter, Adam's state or an"):
        run(trainer, RunDirectory(tmp_path), Last(), 1)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epochs_done"] == 0


# --- Going on at a lower learning rate


def test_a_run_goes_back_and_on_at_half_the_learning_rate(tmp_path):
    config = full_strength("advibp", epochs=4)
    rate = config.learning_rate
    trainer, spoiler = spoiled(config, tmp_path, 3, 1, limit=rate / 3, stops=(4,))
    assert trainer.epochs_done == 4
    metrics = RunDirectory(tmp_path).metrics()
    assert [line["learning_rate_scale"] for line in metrics] == [1, 1, 0.25, 0.25]
    assert [line["learning_rate"] / rate for line in metrics] == [1, 1, 0.25, 0.25]
    assert trainer.optimizer.param_groups[0]["lr"] == rate / 4
    where = "epoch 3, batch 2: the adversarial and certified losses or their gradients"
    for note, scale in zip(spoiler.notes, ("0.5", "0.25"), strict=True):
        assert note.startswith(f"training diverged in {where} are not finite; it goes on after ")
        assert note.endswith(f"epoch 2 at {scale} of the learning rate")
    lines = RunDirectory(tmp_path).divergences()
    assert [line["learning_rate_scale"] for line in lines] == [0.5, 0.25]
    assert all(line["where"].startswith(where) for line in lines)


def test_it_resumes_to_the_bits_of_an_unbroken_one_wherever_it_paused(tmp_path):
    config = full_strength("advibp", epochs=5)
    where, limit = (3, 2), {"limit": config.learning_rate / 2}
    unbroken, _ = spoiled(config, tmp_path / "unbroken", *where, stops=(5,), **limit)
    for name, stops in {"before": (2, 5), "after": (3, 4, 5)}.items():
        resumed, _ = spoiled(config, tmp_path / name, *where, stops=stops, **limit)
        assert torch.equal(parameters_of(unbroken), parameters_of(resumed))
        assert_same_files(tmp_path / "unbroken", tmp_path / name)
    never, _ = spoiled(config, tmp_path / "never", 99, 1, stops=(5,))
    assert not torch.equal(parameters_of(unbroken), parameters_of(never))


def test_killed_before_its_new_checkpoint_it_goes_back_again_and_says_it_once(
    tmp_path, monkeypatch
):
    config = full_strength("advibp", epochs=3)
    where, limit = (2, 1), {"limit": config.learning_rate / 2}
    unbroken, _ = spoiled(config, tmp_path / "unbroken", *where, stops=(3,), **limit)

    class Killed(Exception):
        """Instead of the signal."""

    add = RunDirectory.add_divergence

    def dies(*arguments):
        add(*arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "add_divergence", dies)
        with pytest.raises(Killed):
            spoiled(config, tmp_path / "killed", *where, stops=(3,), **limit)
    resumed, _ = spoiled(config, tmp_path / "killed", *where, stops=(3,), **limit)
    assert torch.equal(parameters_of(unbroken), parameters_of(resumed))
    one, other = (RunDirectory(tmp_path / name).divergences() for name in ("unbroken", "killed"))
    assert one == other


def test_after_five_times_it_ends(tmp_path):
    with pytest.raises(
        Diverged, match=r"at 0\.03125 of the learning rate; .*_rate in a new run\)$"
    ):
        spoiled(full_strength("advibp"), tmp_path, 2, 1)
    lines = RunDirectory(tmp_path).divergences()
    assert [line["learning_rate_scale"] for line in lines] == [
        1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32,
    ]  # fmt: skip
    assert checkpoint.load(tmp_path / "checkpoint.pt")["learning_rate_scale"] == 1 / 32
    assert len(RunDirectory(tmp_path).metrics()) == 1


def test_without_the_option_it_ends_at_once_and_can_be_resumed_with_it(tmp_path):
    config = full_strength("advibp", epochs=3)
    limit = {"limit": config.learning_rate / 2}
    with pytest.raises(Diverged, match=r"are not finite; the checkpoint before it is whole"):
        spoiled(config, tmp_path, 2, 1, on_divergence=divergence.STOP, stops=(3,), **limit)
    assert not RunDirectory(tmp_path).divergences_file.exists()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["learning_rate_scale"] == 1
    trainer, _ = spoiled(config, tmp_path, 2, 1, stops=(3,), **limit)
    assert (trainer.epochs_done, trainer.learning_rate_scale) == (3, 0.5)


def test_from_a_stage_it_goes_back_to_the_network_before_it(tmp_path):
    """Whose BatchNorm the stage has folded, and whose first layers it has frozen."""
    config = full_strength("advibp", epochs=2, **SHI, **STAGES)
    limit = {"limit": config.stage_learning_rate / 2}
    unbroken, _ = spoiled(config, tmp_path / "unbroken", 3, 1, stops=(4,), **limit)
    resumed, _ = spoiled(config, tmp_path / "resumed", 3, 1, stops=(2, 3, 4), **limit)
    assert (unbroken.stage.number, unbroken.learning_rate_scale) == (1, 0.5)
    assert torch.equal(parameters_of(unbroken), parameters_of(resumed))


def test_a_checkpoint_of_an_older_version_goes_on_at_the_whole_learning_rate(tmp_path):
    first, second = (Trainer(full_strength("advibp"), few_digits(), ALONE) for _ in range(2))
    first.train_epoch(Silent())
    state = first.state_dict()
    del state["learning_rate_scale"]
    second.load_state_dict(state)
    assert second.learning_rate_scale == 1


def test_a_damaged_record_is_refused(tmp_path):
    RunDirectory(tmp_path).divergences_file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"divergences\.jsonl: cannot be read"):
        RunDirectory(tmp_path).add_divergence("epoch 1", 0.5)


# --- The command


EXPLODES = (
    *("--epochs", "4", "--set", "learning_rate=1e7", "--set", "gradient_clip=inf"),
    *("--set", "batch_size=400", "--set", "pgd_steps=2", "--run-dir", "run"),
)


def test_the_command_goes_on_by_itself_also_when_resumed(robust_app, tmp_path):
    status, out, err = robust_app(
        "train", *EXPLODES, "--on-divergence", "lower-lr", "--stop-after", "1"
    )
    assert (status, err) == (0, "")
    assert "training diverged in epoch 1" in out
    assert "; it goes on after epoch 0 at 0.5 of the learning rate" in out
    status, out, err = robust_app("train", "--run-dir", "run", "--resume")
    assert (status, err) == (0, "")
    assert "warning: near chance" in out  # as is to be expected of such a run
    _, out, _ = robust_app("evaluate", "run", "--images", "1")
    assert RunDirectory(tmp_path / "run").results()[-1]["misclassified"] == 1
    assert "near chance" not in out  # one image tells nothing of it
    started = RunDirectory(tmp_path / "run").environments()
    assert [made["on_divergence"] for made in started] == ["lower-lr", "lower-lr"]
    metrics = RunDirectory(tmp_path / "run").metrics()
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["learning_rate_scale"] < 1


def test_by_default_the_command_stops(robust_app, tmp_path):
    assert_refused(robust_app("train", *EXPLODES), "training diverged in epoch", "--on-divergence")
    assert_refused(robust_app("train", "--on-divergence", "lower"), "'lower'", "'lower-lr'")


@pytest.mark.parametrize("stored", ["bogus", 5, ["stop"]])
def test_a_choice_from_a_file_is_one_of_them(robust_app, digits_run, tmp_path, stored):
    shutil.copytree(digits_run, tmp_path / "run")
    RunDirectory(tmp_path / "run").add_environment(
        {"device": "cpu", "data_root": None, "on_divergence": stored}
    )
    outcome = robust_app("train", "--run-dir", "run", "--resume")
    assert_refused(outcome, "unknown --on-divergence", stored, "'stop'")


def test_a_network_that_learned_something_is_not_warned_of(robust_app, digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    shutil.copy(tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt")
    status, out, _ = robust_app("evaluate", "run", "--pgd-steps", "1")
    assert status == 0
    assert "warning" not in out


def test_the_short_schedule_of_the_tests_does_not_diverge():
    trainer = Trainer(short_config(), data.load("digits"), ALONE)
    assert trainer.train_epoch(Silent())["learning_rate_scale"] == 1
