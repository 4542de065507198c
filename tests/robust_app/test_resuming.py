"""Runs that stop and go on, and the directories that are refused for it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from robust_app import checkpoint, recipes
from robust_app.errors import UserError
from robust_app.run_directory import RunDirectory
from robust_app.train_command import _requested
from tests.robust_app.refusals import assert_refused
from tests.robust_app.runs import ONE_THREAD, QUICK, STAGES, assert_same_network


def test_a_paused_run_resumes_to_the_bits_of_an_unbroken_one(robust_app, finished_run, tmp_path):
    _, out, _ = robust_app("train", *QUICK, "--run-dir", "again", "--stop-after", "1")
    assert "continue with: robust-app train --run-dir again --resume" in out
    assert not (tmp_path / "again" / "results.json").exists()
    status, _, _ = robust_app("train", "--run-dir", "again", "--resume")
    assert status == 0
    assert_same_network(finished_run, tmp_path / "again")


def test_a_run_that_is_done_is_evaluated_once(robust_app, tmp_path):
    robust_app("train", *QUICK, "--run-dir", "run", "--stop-after", "1")
    robust_app("evaluate", "run")  # of its first epoch, as its last will be
    robust_app("train", "--run-dir", "run", "--resume")
    results = tmp_path / "run" / "results.json"
    kept = results.read_bytes()
    assert "last (epoch 2)" in RunDirectory(tmp_path / "run").results()[-1]["network"]
    status, out, _ = robust_app("train", "--run-dir", "run", "--resume")
    assert status == 0
    assert "done before; its errors are in run/results.json" in out
    assert results.read_bytes() == kept
    directory = RunDirectory(tmp_path / "run")
    directory.results_file.write_text(json.dumps(directory.results()[-1:]))  # of one network
    robust_app("train", "--run-dir", "run", "--resume")
    assert len(directory.results()) > 1
    results.unlink()  # as where it was killed in its evaluation
    robust_app("evaluate", "run", "--pgd-steps", "1")  # another kind
    robust_app("train", "--run-dir", "run", "--resume")
    steps = [entry["pgd_steps"] for entry in RunDirectory(tmp_path / "run").results()]
    assert steps == sorted(steps)
    assert len(set(steps)) == 2


def test_a_start_that_trains_nothing_is_not_noted(robust_app, tmp_path):
    robust_app("train", *QUICK, "--run-dir", "run", "--stop-after", "1")
    made = RunDirectory(tmp_path / "run").environments()
    again = ("train", "--run-dir", "run", "--resume", "--execution", "compile")
    _, out, _ = robust_app(*again, "--stop-after", "1")
    assert "paused after epoch 1" in out
    assert "other bits" not in out
    assert RunDirectory(tmp_path / "run").environments() == made
    # But where the data lie, which the next start looks up there.
    robust_app(*again, "--stop-after", "1", "--data-root", "elsewhere")
    directory = RunDirectory(tmp_path / "run")
    assert directory.data_root() == Path("elsewhere").resolve()
    assert [start["execution"] for start in directory.environments()] == ["eager"] * 2


def test_a_run_with_stages_pauses_and_resumes_anywhere(robust_app, tmp_path):
    status, out, _ = robust_app("train", *STAGES, "--run-dir", "unbroken")
    assert status == 0
    for line in ("epoch 2/6  main", "epoch 3/6  stage 1", "epoch 6/6  stage 2"):
        assert line in out
    robust_app("train", *STAGES, "--run-dir", "paused", "--stop-after", "2")  # before stage 1
    assert (tmp_path / "paused" / "stage-0.pt").exists()
    robust_app("train", "--run-dir", "paused", "--resume", "--stop-after", "5")  # within stage 2
    assert (tmp_path / "paused" / "stage-1.pt").exists()
    assert not (tmp_path / "paused" / "stage-2.pt").exists()
    assert not (tmp_path / "paused" / "results.json").exists()
    assert robust_app("train", "--run-dir", "paused", "--resume")[0] == 0
    stages = tuple(f"stage-{stage}.pt" for stage in range(3))
    assert_same_network(tmp_path / "unbroken", tmp_path / "paused", stages)


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(robust_app, tmp_path):
    longer = ("--epochs", "25", "--set", "batch_size=400", "--set", "pgd_steps=2")
    robust_app("train", *longer, "--run-dir", "unbroken")
    command = [sys.executable, "-m", "robust_app", "train", *longer, "--run-dir", "killed"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.DEVNULL
    ) as process:
        metrics = tmp_path / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = checkpoint.load(tmp_path / "killed" / "checkpoint.pt")["epochs_done"]
    assert done < 25

    status, _, err = robust_app("train", "--run-dir", "killed", "--resume")

    assert (status, err) == (0, "")
    assert_same_network(tmp_path / "unbroken", tmp_path / "killed")


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_run_that_is_told_to_stop_says_how_to_go_on(tmp_path, number, status, word):
    command = [sys.executable, "-m", "robust_app", "train", "--run-dir", "run"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background may have told their children to ignore Ctrl-C.
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, **options) as process:
        assert process.stdout is not None
        while "epoch" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    again = "continue with: robust-app train --run-dir run --resume"
    assert f"{word}; all whole epochs are kept, {again}" in out
    assert err == ""
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epochs_done"] >= 1


def test_a_directory_with_anything_in_it_is_not_overwritten(robust_app, finished_run):
    before = {file: file.read_bytes() for file in finished_run.iterdir()}
    assert_refused(robust_app("train", *QUICK, "--run-dir", finished_run), "not empty", "--resume")
    assert {file: file.read_bytes() for file in finished_run.iterdir()} == before


def test_a_folder_with_other_files_is_left_as_it_is(robust_app, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    assert_refused(
        robust_app("train", *QUICK, "--run-dir", "home"), "not empty", "there is no run in it"
    )
    assert [file.name for file in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_run_without_its_checkpoint_is_not_begun_anew(robust_app, finished_run):
    (finished_run / "checkpoint.pt").unlink()
    before = (finished_run / "metrics.jsonl").read_bytes()
    outcome = robust_app("train", "--run-dir", finished_run, "--resume")
    assert_refused(outcome, "checkpoint.pt", "missing")
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_it_began_can_be_begun(robust_app, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", "config.toml.partial"):
        (tmp_path / "run" / name).write_text("epo")
    assert_refused(robust_app("train", "--run-dir", "run", "--resume"), "no run here")
    assert robust_app("train", *QUICK, "--run-dir", "run", "--stop-after", "1")[0] == 0


def test_an_npz_is_found_again_from_another_folder(robust_app, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.integers(256, size=(60, 8, 8), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    arguments = ("--set", "dataset=npz:mine.npz", "--set", "held_out=10", "--set", "batch_size=25")
    status, out, _ = robust_app("train", *QUICK, *arguments)
    assert status == 0
    assert "run directory: runs/mine-1" in out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert robust_app("evaluate", "../runs/mine-1")[0] == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "environment.json"])
@pytest.mark.parametrize("damage", ["cut", "[1, 2]", "[{}]"])
def test_damaged_records_are_refused_and_kept(robust_app, finished_run, name, damage):
    whole = (finished_run / name).read_text()
    text = whole[: len(whole) // 2] if damage == "cut" else damage
    if damage == "[{}]" and name == "metrics.jsonl":
        text = "{}\n"
    (finished_run / name).write_text(text)
    word = "damaged" if "{}" in damage else "read"
    assert_refused(robust_app("train", "--run-dir", finished_run, "--resume"), name, word)
    assert (finished_run / name).read_text() == text


def test_the_data_are_looked_for_where_they_were(robust_app, tmp_path):
    arguments = (*QUICK, "--stop-after", "1", "--run-dir", "run")
    robust_app("train", *arguments, "--data-root", tmp_path / "data")
    robust_app("train", "--run-dir", "run", "--resume")
    environments = RunDirectory(tmp_path / "run").environments()
    assert [made["data_root"] for made in environments] == [str(tmp_path / "data")] * 2


def test_resuming_with_other_settings_is_refused(robust_app, finished_run):
    outcome = robust_app("train", "--run-dir", finished_run, "--resume", "--seed", "7")
    assert_refused(outcome, "seed", "0", "7")
    outcome = robust_app("train", "--run-dir", finished_run, "--resume", "--seed", "0")
    assert outcome[0] == 0


def test_a_directory_in_use_is_refused(robust_app, finished_run):
    with RunDirectory(finished_run).locked():
        assert_refused(robust_app("train", "--run-dir", finished_run, "--resume"), "in use")
    assert robust_app("train", "--run-dir", finished_run, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("checkpoint.pt", ("train", "--resume", "--run-dir")),
        ("last.pt", ("train", "--resume", "--run-dir")),
        ("best.pt", ("evaluate",)),
    ],
)
def test_a_damaged_file_is_refused_and_kept(robust_app, finished_run, name, command):
    (finished_run / name).write_bytes(b"not a checkpoint")
    assert_refused(robust_app(*command, finished_run), name, "not a checkpoint")
    assert (finished_run / name).read_bytes() == b"not a checkpoint"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_refused(robust_app, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(robust_app("train", *QUICK, "--run-dir", "locked/run"), "cannot be written")


def test_a_run_directory_that_is_a_file_is_refused(robust_app, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(robust_app("train", *QUICK, "--run-dir", "file"), "file", "not a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_resumed_run_may_have_what_it_does_not_read_as_it_is_stored():
    setting = "crown_share=[1, 0.5]"
    stored = dataclasses.replace(recipes.load("digits"), crown_share=(1.0, 0.5))
    assert _requested(stored, "digits", [setting], None, None) == stored
    assert _requested(stored, None, ["crown_share=[1, 0]"], None, None) != stored
    with pytest.raises(UserError, match="crown_share"):
        _requested(None, "digits", [setting], None, None)
