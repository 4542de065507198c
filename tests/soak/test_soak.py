"""A little of the soak: each part tries a few, and would end with an error at the first loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robust_app import checkpoint
from robust_app.run_directory import RunDirectory
from tests.robust_app.runs import few_digits, full_strength, trained
from tests.soak import certificates
from tests.soak.__main__ import PARTS, main
from tests.soak.soundness import Unsound, check, differences, flat

ROOT = Path(__file__).parents[2]
CONFIG = full_strength("ibp", epochs=2, seed=3)


def soaked(part: str, output: Path) -> dict:
    """What a part finds with few attempts, in a process of its own: it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", part, "--quick", "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((output / f"reliability-{part}.json").read_text(encoding="utf-8"))


def test_runs_that_are_killed_end_as_the_unbroken_one(tmp_path):
    found = soaked("kills", tmp_path)
    counts = {kind: sum(places.values()) for kind, places in found["kills"].items()}
    assert counts == {"SIGKILL": 4, "SIGTERM": 1, "SIGINT": 1}
    assert found["runs equal to the unbroken one"] >= 1
    assert found["made with"]["command"] == "python -m tests.soak kills --quick"


def test_certificates_are_attacked_and_compared(tmp_path):
    found = soaked("certificates", tmp_path)
    tried = found["attempts"]
    assert tried["starts of PGD"] + tried["corners"] >= 5_000
    assert 0 < tried["images"] <= found["bounds"]["crown-ibp"]["certified"]
    for bounds in found["bounds"].values():
        assert 0 < bounds["certified"] <= bounds["by float32 bounds"] <= bounds["images"]


def test_an_unsound_certificate_ends_the_soak():
    network = torch.nn.Flatten()  # class 0 where the first pixel is the brighter one
    x = torch.tensor([[0.6, 0.5]])
    with pytest.raises(Unsound, match="1 certified images have counterexamples"):
        certificates.attack(network, x, torch.tensor([0]), 0.1, 10)
    tried = certificates.attack(network, x, torch.tensor([0]), 0.04, 10)
    assert tried["starts of PGD"] + tried["corners"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("kills", "certificates")])
def test_each_part_finds_nothing_lost(part, tmp_path):
    assert soaked(part, tmp_path)["seconds"] > 0


def test_wrong_use_of_the_command_is_refused(capsys):
    for arguments, word in ((["kill"], "no part"), (["kills", "--quick"], "--output")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert word in capsys.readouterr().err


@pytest.fixture
def finished(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.start(CONFIG)
    trained(CONFIG, directory.path, stops=(2,), dataset=few_digits())
    directory.add_results([{"network": "last", "seconds": 1.0}])
    return directory


def test_a_single_bit_is_a_difference(finished, tmp_path):
    other = RunDirectory(tmp_path / "other")
    finished.path.rename(other.path)
    finished.path.mkdir()
    finished.start(CONFIG)
    trained(CONFIG, finished.path, stops=(1, 2), dataset=few_digits())
    finished.add_results([{"network": "last", "seconds": 2.0}])
    assert differences(finished.path, other.path) == []
    state = checkpoint.load(finished.checkpoint_file)
    leaf = next(
        leaf
        for path, leaf in flat(state["optimizer"]).items()
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 1
    )
    leaf.view(-1).view(torch.int32)[0] ^= 1
    checkpoint.save(state, finished.checkpoint_file)
    assert differences(finished.path, other.path) == ["checkpoint.pt"]
    (other.path / "best.pt.partial").touch()
    assert differences(finished.path, other.path) == ["checkpoint.pt", "best.pt.partial"]


def test_half_a_line_and_a_lost_epoch_are_unsound(finished):
    check(finished.path, at_least=2)
    with pytest.raises(Unsound, match="after one of 3"):
        check(finished.path, at_least=3)
    text = finished.metrics_file.read_text()
    finished.metrics_file.write_text(text[:-1])
    with pytest.raises(Unsound, match="half a line"):
        check(finished.path)
    finished.metrics_file.write_text(text[: text.index("\n") + 1])
    with pytest.raises(Unsound, match="a checkpoint of 2"):
        check(finished.path)
