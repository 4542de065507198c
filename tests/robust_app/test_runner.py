"""A run that is watched; the command's own words are in test_cli.py."""

import pytest
from rich.console import Console

from robust_app import runner
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
