"""A run that is watched; the command's own words are in test_cli.py."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from robust_app import runner
from robust_app.errors import UserError
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.robust_app.runs import ALONE, few_digits, full_strength


class Interrupted(Trainer):
    """Ctrl-C when so many epochs are done."""

    stops_after = 1

    def train_epoch(self, watcher):
        if self.epochs_done == self.stops_after:
            raise KeyboardInterrupt
        return super().train_epoch(watcher)


@pytest.fixture
def directory(tmp_path):
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    return found


@pytest.fixture
def trainer():
    return Interrupted(full_strength("ibp"), few_digits(), ALONE)


def interrupt(trainer, directory):
    with pytest.raises(KeyboardInterrupt):
        runner.train(trainer, directory, Console(quiet=True), data_root=None, stop_after=3)


def test_an_interrupted_run_has_the_curves_of_its_whole_epochs(trainer, directory):
    interrupt(trainer, directory)
    assert len(directory.metrics()) == 1
    assert directory.curves_file.read_bytes().startswith(b"\x89PNG")


def test_one_without_an_epoch_has_none(trainer, directory):
    trainer.stops_after = 0
    interrupt(trainer, directory)
    assert not directory.curves_file.exists()


def test_curves_that_cannot_be_drawn_do_not_hide_the_interruption(trainer, directory):
    directory.start(trainer.config)
    directory.curves_file.mkdir()
    interrupt(trainer, directory)


def test_what_a_run_is_resumed_with_is_told_where_it_differs(trainer, directory, monkeypatch):
    interrupt(trainer, directory)
    [made] = directory.environments()
    older = {"packages": made["packages"] | {"torch": "2.0"}, "processes": 3, "commit": None}
    monkeypatch.setattr("robust_app.environment._commit", lambda: None)  # the tree may be dirty
    directory.environment_file.write_text(json.dumps([made | older]))
    said = io.StringIO()
    again = Interrupted(trainer.config, few_digits(), ALONE)
    console = Console(file=said, width=200)
    with pytest.raises(KeyboardInterrupt):
        runner.train(again, directory, console, data_root=None, stop_after=3)
    here = made["packages"]["torch"]
    assert f"other bits than unbroken (torch: 2.0, here {here}; processes: 3" in said.getvalue()
    said.truncate(0)
    with pytest.raises(KeyboardInterrupt):
        runner.train(again, directory, console, data_root=None, stop_after=3)
    assert "resumed where" not in said.getvalue()


def test_a_run_that_another_process_began_meanwhile_is_left_alone(trainer, directory):
    directory.start(dataclasses.replace(trainer.config, seed=7))
    with pytest.raises(UserError, match="holds another run"):
        runner.train(trainer, directory, Console(quiet=True), data_root=None, stop_after=1)
    assert not directory.environments()
