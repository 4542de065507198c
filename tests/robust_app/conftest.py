"""The command line as the tests call it, and a small run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from robust_app import checkpoint, cli, data, loading
from robust_app.networks import build_network
from robust_app.run_directory import RunDirectory
from tests.robust_app.runs import ONE_THREAD, QUICK, short_config


@pytest.fixture
def robust_app(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; returns exit status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robust-app", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output = capsys.readouterr()
        return stopped.value.code or 0, output.out, output.err

    return call


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, digits):
    """The folder of a run on the digits that nobody changes; its radius is small."""
    directory = RunDirectory(tmp_path_factory.mktemp("digits") / "run")
    directory.path.mkdir()
    config = short_config(evaluation_epsilon=0.003, pgd_steps=5)
    directory.start(config)
    torch.manual_seed(0)
    network = build_network(config, digits)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for batch in torch.randint(len(digits.x_train), (40, 64)):
        optimizer.zero_grad()
        F.cross_entropy(network(digits.x_train[batch] / 255), digits.y_train[batch]).backward()
        optimizer.step()
    saved = loading.content(config, epoch=1, network=network.state_dict())
    checkpoint.save(saved, directory.best_file)
    return directory.path


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A short, complete run that nobody changes."""
    folder = tmp_path_factory.mktemp("template")
    command = [sys.executable, "-m", "robust_app", "train", *QUICK, "--run-dir", "run"]
    subprocess.run(command, cwd=folder, env=ONE_THREAD, check=True, stdout=subprocess.DEVNULL)
    return folder / "run"


@pytest.fixture
def finished_run(template, tmp_path):
    """A directory with a short, complete run."""
    return Path(shutil.copytree(template, tmp_path / "run"))
