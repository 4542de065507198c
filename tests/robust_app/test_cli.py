"""The command line as its user meets it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mogd
from robust_app import checkpoint, cli
from robust_app.run_directory import RunDirectory

QUICK = ("--epochs", "2", "--set", "batch_size=400", "--set", "pgd_steps=2")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
MNIST = Path(__file__).parents[3] / "shared" / "data"


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


@pytest.fixture(scope="module")
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


def assert_refused(outcome, *words):
    """Status 2 and one line on standard error that holds the words."""
    status, _, err = outcome
    assert status == 2, err
    assert err.count("\n") == 1, err
    for word in words:
        assert str(word) in err


def test_a_run_leaves_the_files_of_the_contract(finished_run):
    names = {file.name for file in finished_run.iterdir()}
    expected = {"config.toml", "metrics.jsonl", "checkpoint.pt", "best.pt", "last.pt"}
    assert names - {".lock"} == expected | {"environment.json", "curves.png", "results.json"}
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = (finished_run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    [environment] = RunDirectory(finished_run).environments()
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert environment["packages"]["mogd"] == mogd.__version__
    assert (environment["device"], environment["seed"]) == ("cpu", 0)


def test_train_prints_a_line_an_epoch_and_a_table(robust_app):
    status, out, _ = robust_app("train", *QUICK)
    assert status == 0
    assert "run directory: runs/digits-1" in out
    assert "epoch 1/2" in out
    assert "epoch 2/2" in out
    for word in ("standard", "PGD", "verified", "certified", "falsified", "undecided"):
        assert word in out
    assert "\x1b[" not in out  # no terminal, no control codes

    _, out, _ = robust_app("train", *QUICK, "--stop-after", "1")
    assert "run directory: runs/digits-2" in out


def test_evaluate_reports_counts_that_add_up(robust_app, finished_run):
    status, out, _ = robust_app("evaluate", finished_run, "--epsilon", "0.05", "--pgd-steps", "3")
    assert status == 0
    assert "ε = 0.05" in out
    results = RunDirectory(finished_run).results()
    assert {result["epsilon"] for result in results} == {0.1, 0.05}
    for result in results:
        assert result["certified"] + result["falsified"] + result["undecided"] == 360
        assert result["standard_error"] <= result["pgd_error"] <= result["verified_error"]
    assert results[-1]["pgd_steps"] == 3


def test_a_paused_run_resumes_to_the_bits_of_an_unbroken_one(robust_app, finished_run, tmp_path):
    _, out, _ = robust_app("train", *QUICK, "--run-dir", "again", "--stop-after", "1")
    assert "continue with: robust-app train --run-dir again --resume" in out
    assert not (tmp_path / "again" / "results.json").exists()
    status, _, _ = robust_app("train", "--run-dir", "again", "--resume")
    assert status == 0
    assert_same_network(finished_run, tmp_path / "again")


def assert_same_network(one: Path, other: Path) -> None:
    for name in ("checkpoint.pt", "best.pt", "last.pt"):
        first, second = (checkpoint.load(path / name)["network"] for path in (one, other))
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)


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


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "robust_app", "train", "--run-dir", "run"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background may have told their children to ignore Ctrl-C.
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, **options) as process:
        assert process.stdout is not None
        while "epoch" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "continue with: robust-app train --run-dir run --resume" in out
    assert "Traceback" not in err
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epochs_done"] >= 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("recipes", ("digits", "mnist-dm-small", "cifar10-dm-large")),
        ("models", ("dm-small", "Conv 16 4×4+2", "digits-cnn")),
        ("methods", ("advibp", "weighted-sum")),
        ("datasets", ("mnist", "npz:PATH")),
    ],
)
def test_tables_show_what_there_is(robust_app, command, words):
    status, out, _ = robust_app(command)
    assert status == 0
    for word in words:
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "digit"), ("recipe", "'digits'")),
        (("--recipe", "missing.toml"), ("missing.toml", "cannot be read")),
        (("--set", "epsilom=0.1"), ("epsilom", "'epsilon'")),
        (("--set", "epsilon=2"), ("epsilon", "[0, 1]", "2")),
        (("--set", "epsilon"), ("key=value", "epsilon")),
        (("--set", "epochs=3"), ("warm-up", "--epochs")),
        (("--epochs", "0"), ("--epochs",)),
        (("--epochs", "none"), ("--epochs",)),
        (("--epoch", "3"), ("--epoch",)),
        (("--set", "model=dm-smal"), ("dm-smal", "dm-small")),
        (("--set", "method=advipb"), ("advipb", "advibp")),
        (("--set", "dataset=mnits"), ("mnits", "mnist")),
        (("--set", "batch_size=5000"), ("batch_size", "1293", "5000")),
        (("--recipe", "mnist-dm-small"), ("mnist", "--data-root")),
        (("--recipe", "mnist-dm-small", "--data-root", "nowhere"), ("nowhere", "--download")),
        (("--set", "dataset=npz:missing.npz"), ("missing.npz",)),
        (("--device", "cuda:99"), ("--device", "99")),
        (("--device", "tpu"), ("--device", "tpu")),
        (("--resume",), ("--run-dir",)),
        (("--resume", "--run-dir", "nowhere"), ("nowhere", "no run here")),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(robust_app, tmp_path, arguments, words):
    assert_refused(robust_app("train", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_one_line_and_status_2(robust_app):
    assert_refused(robust_app("trian"), "trian")


def test_one_process_of_many_speaks(robust_app, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert robust_app("train", "--recipe", "digit") == (2, "", "")


def test_help_is_no_error(robust_app):
    status, out, _ = robust_app("train", "--help")
    assert status == 0
    assert "--resume" in out


def test_a_recipe_with_an_unknown_key_names_the_nearest(robust_app, tmp_path):
    (tmp_path / "mine.toml").write_text("dataset = 'digits'\nlearning_rat = 0.1\n")
    outcome = robust_app("train", "--recipe", "mine.toml")
    assert_refused(outcome, "mine.toml", "learning_rat", "'learning_rate'")


def test_nan_in_the_data_is_refused(robust_app, tmp_path):
    x, y = np.random.default_rng(0).random((4, 8, 8)).astype(np.float32), np.arange(4) % 2
    x[1, 2, 3] = np.nan
    np.savez(tmp_path / "bad.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert_refused(robust_app("train", "--set", "dataset=npz:bad.npz"), "bad.npz", "x_train", "nan")
    assert not (tmp_path / "runs").exists()


def test_a_truncated_idx_file_is_refused(robust_app, tmp_path):
    if not MNIST.is_dir():
        pytest.skip("the real MNIST files are not beside this checkout")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (MNIST / "MNIST" / "raw").iterdir():
        (raw / file.name).write_bytes(file.read_bytes()[:1000])
    assert_refused(robust_app("train", "--recipe", "mnist-dm-small", "--data-root", "."), "mnist")


def test_a_directory_with_anything_in_it_is_not_overwritten(robust_app, finished_run):
    before = {file: file.read_bytes() for file in finished_run.iterdir()}
    assert_refused(robust_app("train", *QUICK, "--run-dir", finished_run), "not empty", "--resume")
    assert {file: file.read_bytes() for file in finished_run.iterdir()} == before


def test_a_folder_with_other_files_is_left_as_it_is(robust_app, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    assert_refused(robust_app("train", *QUICK, "--run-dir", "home"), "not empty")
    assert [file.name for file in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_run_without_its_checkpoint_is_not_begun_anew(robust_app, finished_run):
    (finished_run / "checkpoint.pt").unlink()
    before = (finished_run / "metrics.jsonl").read_bytes()
    outcome = robust_app("train", "--run-dir", finished_run, "--resume")
    assert_refused(outcome, "checkpoint.pt", "missing")
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_an_npz_is_found_again_from_another_folder(robust_app, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.integers(256, size=(60, 8, 8), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    arguments = ("--set", "dataset=npz:mine.npz", "--set", "held_out=10", "--set", "batch_size=25")
    status, _, _ = robust_app("train", *QUICK, *arguments, "--run-dir", "run")
    assert status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert robust_app("evaluate", "../run")[0] == 0


def test_a_bare_call_shows_the_help_and_no_empty_error(robust_app):
    _, out, err = robust_app()
    assert "train" in out + err
    assert "robust-app: \n" not in err


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "environment.json"])
@pytest.mark.parametrize("damage", ["cut", "list"])
def test_damaged_records_are_refused_and_kept(robust_app, finished_run, name, damage):
    whole = (finished_run / name).read_text()
    text = whole[: len(whole) // 2] if damage == "cut" else "[1, 2]"
    (finished_run / name).write_text(text)
    assert_refused(robust_app("train", "--run-dir", finished_run, "--resume"), name, "read")
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


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt"])
def test_a_damaged_file_is_refused_and_kept(robust_app, finished_run, name):
    (finished_run / name).write_bytes(b"not a checkpoint")
    outcome = robust_app("train", "--run-dir", finished_run, "--resume")
    assert_refused(outcome, name, "not a checkpoint")
    assert (finished_run / name).read_bytes() == b"not a checkpoint"


def test_the_model_of_another_run_is_refused(robust_app, finished_run):
    model = checkpoint.load(finished_run / "last.pt")
    model["network"]["0.weight"] = model["network"]["0.weight"][:3].clone()
    checkpoint.save(model, finished_run / "last.pt")
    assert_refused(robust_app("evaluate", finished_run), "last.pt", "another network")


def test_evaluate_refuses_what_it_cannot_use(robust_app, finished_run):
    assert_refused(robust_app("evaluate", "nowhere"), "nowhere", "no run here")
    assert_refused(robust_app("evaluate", finished_run, "--verifier", "ipb"), "ipb", "'ibp'")
    assert_refused(robust_app("evaluate", finished_run, "--epsilon", "-1"), "epsilon", "-1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_refused(robust_app, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(robust_app("train", *QUICK, "--run-dir", "locked/run"), "cannot be written")


def test_a_run_directory_that_is_a_file_is_refused(robust_app, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(robust_app("train", *QUICK, "--run-dir", "file"), "file", "not a folder")
    assert (tmp_path / "file").read_text() == "mine"
