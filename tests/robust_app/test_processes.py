"""The command line under torchrun."""

import subprocess
from pathlib import Path

import pytest

from tests.robust_app.refusals import assert_refused
from tests.robust_app.runs import ONE_THREAD, QUICK, STAGES, TORCHRUN, assert_same_network


def by_two_processes(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Status and output of a training by torchrun."""
    command = [*TORCHRUN, "-m", "robust_app", "train", *arguments]
    done = subprocess.run(command, cwd=folder, env=ONE_THREAD, text=True, capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("environment.json", ('"data": "', '"data": "0'), "made on other data than these"),
        ("metrics.jsonl", ('"seconds": ', '"seconds": "x", "before": '), "seconds is not a"),
    ],
)
def test_what_all_processes_find_is_said_once_and_they_do_not_wait(tmp_path, file, damage, reason):
    assert by_two_processes(tmp_path, "--epochs", "1", "--run-dir", "run")[0] == 0
    damaged = tmp_path / "run" / file
    damaged.write_text(damaged.read_text().replace(*damage))
    status, out, err = by_two_processes(tmp_path, "--run-dir", "run", "--resume")
    assert status != 0
    (line,) = (line for line in err.splitlines() if line.startswith("robust-app: "))
    assert reason in line
    assert "continue with" not in out + err


@pytest.mark.slow
def test_a_run_of_two_processes_pauses_in_a_stage_and_resumes(tmp_path):
    def call(*arguments: str) -> str:
        status, out, _ = by_two_processes(tmp_path, *arguments)
        assert status == 0
        return out

    shi = ("--set", "batch_norm=true", "--set", "ibp_initialization=true")
    call(*STAGES, *shi, "--run-dir", "unbroken")
    call(*STAGES, *shi, "--run-dir", "paused", "--stop-after", "3")
    out = call("--run-dir", "paused", "--resume")
    assert out.count("epoch 4/6  stage 1") == 1  # one process speaks
    assert_same_network(tmp_path / "unbroken", tmp_path / "paused")


def test_one_process_of_many_speaks(robust_app, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert robust_app("train", "--recipe", "digit") == (2, "", "")


def test_what_one_process_alone_may_find_it_says_itself(robust_app, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert_refused(robust_app("train", *QUICK, "--device", "cuda:99"), "--device: no GPU 99 here")


def test_torchrun_continues_the_run_that_it_starts_again(robust_app, finished_run, monkeypatch):
    again = ("train", *QUICK, "--run-dir", finished_run)
    assert_refused(robust_app(*again), "not empty")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert robust_app(*again)[0] == 0
    way_out = f"as far as a fork may differ: robust-app fork {finished_run} --set KEY=VALUE"
    assert_refused(robust_app(*again, "--set", "gradient_clip=3"), "--resume: the run has", way_out)
    way_out = "train another run from its start: no fork may differ in that either"
    assert_refused(robust_app(*again, "--seed", "5"), "--resume: the run has seed", way_out)
    way_out = f"schedule as it is: robust-app fork {finished_run} --set epochs=90"
    again = ("train", "--resume", "--run-dir", finished_run)
    assert_refused(robust_app(*again, "--epochs", "90"), "--resume: the run has", way_out)
    way_out = "train another run from its start"
    assert_refused(robust_app(*again, "--epochs", "1"), "--resume: the run has", way_out)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert_refused(robust_app("train", *QUICK), "--run-dir: needed with --max-restarts")
