"""A run's networks, from its directory to errors on test images."""

import dataclasses
import math

import pytest
import torch

from robust_app import checkpoint, data, recipes
from robust_app.errors import UserError
from robust_app.examination import Examination, measure
from robust_app.loading import content, load_network
from robust_app.networks import build_network
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.session import ends_stage, run
from robust_app.training import Trainer
from tests.robust_app.runs import ALONE, assert_same_files, few_digits, full_strength, trained

DIGITS = recipes.load("digits")


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture
def network(digits) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(DIGITS, digits).eval()


def test_an_examination_is_by_default_the_one_of_the_run():
    config = dataclasses.replace(DIGITS, evaluation_epsilon=0.05, pgd_steps=7, pgd_restarts=2)
    assert Examination.of(config) == Examination(
        epsilon=0.05, pgd_steps=7, pgd_restarts=2, verifiers=("ibp",), time_limit=60.0, images=None
    )


@pytest.mark.parametrize(
    "change",
    [
        *({"time_limit": limit} for limit in (math.inf, math.nan, 0.0, -1.0, "60")),
        *({"epsilon": epsilon} for epsilon in (math.nan, -0.1, 1.1, "0.1", None, True)),
        *({name: n} for name in ("pgd_steps", "pgd_restarts") for n in (0, "10", 1.5, None, True)),
        *({"images": images} for images in (0, -1, "10", 2.0, False)),
    ],
)
def test_an_examination_that_cannot_be_made_is_refused(change):
    how = Examination(0.1, pgd_steps=1, pgd_restarts=1)
    [name] = change
    with pytest.raises(UserError, match=f"^{name}: expected a"):
        dataclasses.replace(how, **change)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    directory = RunDirectory(tmp_path)
    for write in (directory.add_results, directory.write_metrics):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write([{"network": "last", "figure": value}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.add_environment({"figure": value})
    assert not list(tmp_path.iterdir())


def test_stages_end_with_their_last_epoch():
    config = dataclasses.replace(DIGITS, epochs=40, stages=2, stage_epochs=3)
    ends = [epochs for epochs in range(47) if ends_stage(config, epochs)]
    assert ends == [40, 43, 46]
    assert config.total_epochs == 46


def test_all_test_images_are_measured_unless_fewer_are_asked_for(digits, network):
    how = Examination(0.02, pgd_steps=1, pgd_restarts=1)
    told = []
    errors = measure(network, digits, how, 0, told.append)
    assert errors.examples == sum(told) == 360
    few = dataclasses.replace(how, images=50)
    told.clear()
    assert measure(network, digits, few, 0, told.append).examples == sum(told) == 50


def test_the_images_drawn_depend_on_the_seed_alone(digits, network, monkeypatch):
    how = Examination(0.02, pgd_steps=1, pgd_restarts=1, images=37)
    seen, kind = [], torch.nn.Conv2d
    forward = kind.forward

    def look(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return forward(layer, x)

    monkeypatch.setattr(kind, "forward", look)

    def drawn(seed: int) -> torch.Tensor:
        seen.clear()
        measure(network, digits, how, seed, lambda _: None)
        return seen[0]

    first = drawn(3)
    assert torch.equal(first, drawn(3))
    assert not torch.equal(first, drawn(4))
    assert len(first.flatten(1).unique(dim=0)) == 37  # none of them twice


def test_more_images_than_there_are_is_refused(digits, network):
    how = Examination(0.02, pgd_steps=1, pgd_restarts=1, images=361)
    with pytest.raises(
        UserError, match=r"^images: expected at most the 360 test images, found 361"
    ):
        measure(network, digits, how, 0, lambda _: None)


def test_a_saved_network_is_loaded_with_its_epoch(tmp_path, digits, network):
    directory = RunDirectory(tmp_path)
    directory.start(DIGITS)
    saved = content(DIGITS, epoch=5, network=network.state_dict())
    checkpoint.save(saved, directory.stage_file(2))
    loaded, epoch = load_network(directory, digits, "stage-2")
    assert epoch == 5
    assert not loaded.training
    x = digits.x_test[:3].float() / 255
    assert torch.equal(loaded(x), network(x))
    with pytest.raises(UserError, match=r"stage-1\.pt: missing; a run has it once"):
        load_network(directory, digits, "stage-1")


def test_a_file_without_a_network_is_refused(tmp_path, digits):
    directory = RunDirectory(tmp_path)
    directory.start(DIGITS)
    checkpoint.save(content(DIGITS, epoch=5), directory.last_file)
    with pytest.raises(UserError, match=r"last\.pt: holds no network$"):
        load_network(directory, digits, "last")


def test_what_a_kill_kept_from_being_written_is_made_from_the_checkpoint(tmp_path):
    config = full_strength("ibp", epochs=2, seed=3, stages=1, stage_epochs=1)
    config = dataclasses.replace(config, stage_learning_rate=1e-3)
    directories = {name: RunDirectory(tmp_path / name) for name in ("unbroken", "killed")}
    for directory in directories.values():
        directory.path.mkdir()
        directory.start(config)
        trained(config, directory.path, stops=(2,), dataset=few_digits())
    killed, unbroken = directories["killed"], directories["unbroken"]
    assert unbroken.stage_file(0).exists()
    for file in (killed.best_file, killed.stage_file(0), killed.last_file):
        if checkpoint.load(file)["epoch"] == 2:
            file.unlink()
    later = {**killed.metrics()[-1], "epoch": 3}  # its checkpoint was not written any more
    killed.write_metrics([*killed.metrics(), later])
    run(Trainer(config, few_digits(), ALONE), killed, Silent(), 2)
    assert_same_files(unbroken.path, killed.path)
    before = killed.last_file.stat().st_mtime_ns
    run(Trainer(config, few_digits(), ALONE), killed, Silent(), 2)
    assert killed.last_file.stat().st_mtime_ns == before  # nothing was to be mended


class Noting(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("best", [1, 2])
def test_a_best_network_that_is_lost_is_made_again_or_told_of(tmp_path, best):
    config, directory = full_strength("ibp", epochs=2), RunDirectory(tmp_path)
    directory.start(config)
    trained(config, tmp_path, stops=(2,), dataset=few_digits())
    lines = directory.metrics()
    lines[best - 1]["verified_error"] = -1.0  # lower than the other's
    directory.write_metrics(lines)
    directory.best_file.unlink(missing_ok=True)
    watcher = Noting()
    run(Trainer(config, few_digits(), ALONE), directory, watcher, 2)
    if best == 2:
        assert checkpoint.load(directory.best_file)["epoch"] == 2
        assert watcher.notes == []
    else:
        assert watcher.notes == [f"{directory.best_file}: missing, the network of epoch 1"]
        assert not directory.best_file.exists()


def test_a_run_whose_metrics_are_lost_is_not_resumed(tmp_path):
    config, directory = full_strength("ibp", epochs=2), RunDirectory(tmp_path)
    directory.start(config)
    trained(config, tmp_path, stops=(2,), dataset=few_digits())
    directory.write_metrics(directory.metrics()[:1])
    with pytest.raises(UserError, match=r"jsonl: 2 epochs are done, found the metrics of 1$"):
        run(Trainer(config, few_digits(), ALONE), directory, Silent(), 2)
