"""The command line as its user meets it."""

import dataclasses
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
from robust_app import checkpoint, cli, recipes
from robust_app.errors import UserError
from robust_app.evaluation import Contradiction
from robust_app.methods import METHODS
from robust_app.models import MODELS
from robust_app.run_directory import RunDirectory
from robust_app.train_command import _requested
from robust_app.verifiers import VERIFIERS, Verdicts, Verifier
from tests.robust_app.refusals import assert_refused

QUICK = ("--epochs", "2", "--set", "batch_size=400", "--set", "pgd_steps=2")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
MNIST = Path(__file__).parents[3] / "shared" / "data"


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--execution", "graph"), ["--execution: graph needs a GPU, found cpu"]),
        (("--execution", "graphs"), ["unknown --execution 'graphs'", "'graph'"]),
        (("--set", "precision=tf32"), ["precision: tf32 needs a GPU, found cpu"]),
        (("--set", "precision=fp16"), ["precision: expected float32, tf32 or bf16, found 'fp16'"]),
    ],
)
def test_what_a_device_cannot_do_is_refused_before_anything_is_written(robust_app, options, words):
    assert_refused(robust_app("train", "--device", "cpu", *options), *words)
    assert not any(path.name != ".lock" for path in Path("runs").rglob("*") if path.is_file())


def test_the_execution_is_noted_and_the_precision_is_of_the_run(robust_app):
    options = ("--set", "precision=bf16", "--run-dir", "run", "--stop-after", "1")
    assert robust_app("train", *QUICK, *options)[0] == 0
    [environment] = RunDirectory(Path("run")).environments()
    assert environment["execution"] == "eager"
    assert RunDirectory(Path("run")).config().precision == "bf16"
    outcome = robust_app("train", "--run-dir", "run", "--resume", "--set", "precision=float32")
    assert_refused(outcome, "precision: bf16, not float32")


@pytest.mark.parametrize("radius", [0.1, 0.05])
def test_another_radius_of_the_evaluation_is_told(robust_app, radius):
    options = ("--epochs", "1", "--set", "pgd_steps=1", "--set", f"epsilon={radius}")
    _, out, _ = robust_app("train", *options)
    assert ("trained at ε = 0.05, evaluated at 0.1 (evaluation_epsilon)" in out) == (radius < 0.1)


def test_a_method_without_a_radius_is_not_told_to_train_at_one(robust_app):
    options = ("--epochs", "1", "--set", "pgd_steps=1", "--set", "evaluation_epsilon=0.05")
    _, out, _ = robust_app("train", "--recipe", "digits-natural", *options)
    assert "trained at" not in out


def test_a_reader_that_has_left_ends_a_run_with_a_word(tmp_path):
    command = [sys.executable, "-m", "robust_app", "train", "--epochs", "9", "--run-dir", "run"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ONE_THREAD | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("run directory")
        process.stdout.close()
        err = process.stderr.read()
        assert err == "robust-app: standard output: closed by who read it\n"
        assert process.wait() == 2


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


def test_with_an_output_the_run_is_left_as_it_is(robust_app, finished_run, tmp_path):
    (finished_run / ".lock").unlink()
    before = {file.name: file.read_bytes() for file in finished_run.iterdir()}
    evaluation = ("evaluate", finished_run, "--images", "20", "--epsilon", "0.05")
    assert robust_app(*evaluation, "--output", "errors.json")[0] == 0
    assert {file.name: file.read_bytes() for file in finished_run.iterdir()} == before
    found = json.loads((tmp_path / "errors.json").read_text())
    assert (found["network"], found["dataset"]) == (str(finished_run), "digits")
    assert robust_app(*evaluation)[0] == 0
    kept = RunDirectory(finished_run).results()[-len(found["networks"]) :]
    for one, other in zip(found["networks"], kept, strict=True):
        for result in (one, other):
            del result["shares"], result["environment"]["command"]  # seconds, and the output
        assert one == other
    (finished_run / "results.json").unlink()
    for name in (".lock", "results.json", "mine.json"):
        outcome = robust_app(*evaluation, "--output", finished_run / name)
        assert_refused(outcome, "--output: expected a file outside of the run")


def test_a_cascade_shows_who_decided_what(robust_app, finished_run):
    cascade = ("--verifier", "ibp,crown-ibp", "--images", "40", "--time-limit", "5")
    status, out, _ = robust_app("evaluate", finished_run, *cascade, "--epsilon", "0.02")
    assert status == 0
    assert "40 test images" in out
    assert "verified by ibp, crown-ibp" in out
    assert "decided by" in out
    result = RunDirectory(finished_run).results()[-1]
    assert result["certified"] + result["falsified"] + result["undecided"] == 40
    assert (result["verifiers"], result["images"]) == (["ibp", "crown-ibp"], 40)
    assert result["time_limit"] == 5
    shares = result["shares"]
    assert list(shares) == ["pgd", "ibp", "crown-ibp"]
    assert shares["ibp"]["certified"] + shares["crown-ibp"]["certified"] == result["certified"]
    left = 40 - shares["pgd"]["falsified"] - shares["ibp"]["certified"]
    assert shares["crown-ibp"]["examples"] == left


def test_the_complete_verifier_stops_at_its_time_limit(robust_app, finished_run):
    pytest.importorskip("scipy")
    options = ("--verifier", "ibp,exact", "--images", "3", "--time-limit", "1e-6")
    status, out, _ = robust_app("evaluate", finished_run, *options, "--epsilon", "0.01")
    assert status == 0
    assert "verified by ibp, exact" in out
    result = RunDirectory(finished_run).results()[-1]
    assert (result["time_limit"], result["examples"]) == (1e-6, 3)
    assert result["certified"] + result["falsified"] + result["undecided"] == 3


@pytest.mark.parametrize("limit", ["inf", "nan", "0"])
def test_a_time_limit_that_could_not_be_kept_is_refused(robust_app, finished_run, limit):
    before = (finished_run / "results.json").read_bytes()
    outcome = robust_app("evaluate", finished_run, "--images", "3", "--time-limit", limit)
    assert_refused(outcome, "--time-limit: expected a positive, finite number")
    assert (finished_run / "results.json").read_bytes() == before


def test_a_radius_may_be_a_fraction(robust_app, finished_run):
    assert robust_app("evaluate", finished_run, "--images", "3", "--epsilon", "8/255")[0] == 0
    assert RunDirectory(finished_run).results()[-1]["epsilon"] == 8 / 255


@pytest.mark.parametrize("radius", ["a", "1/0", "8/255/2", "8/", ""])
def test_a_radius_that_is_no_number_is_refused(robust_app, finished_run, radius):
    outcome = robust_app("evaluate", finished_run, "--images", "3", "--epsilon", radius)
    assert_refused(outcome, "--epsilon", "expected a number, 0.1 or 8/255", repr(radius))


@pytest.mark.parametrize("radius", ["inf", "nan", "1e9999999", "9/8"])
def test_a_radius_out_of_range_is_refused_at_once(robust_app, finished_run, radius):
    outcome = robust_app("evaluate", finished_run, "--images", "3", "--epsilon", radius)
    assert_refused(outcome, "epsilon: expected a number in [0, 1]")


def test_one_verifier_needs_no_table_of_shares(robust_app, finished_run):
    _, out, _ = robust_app("evaluate", finished_run, "--images", "40")
    assert "decided by" not in out


def test_an_unsound_bound_is_no_fault_of_the_user(robust_app, finished_run, monkeypatch):
    def everything(network, x, labels, epsilon, seconds):
        return Verdicts(torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool))

    monkeypatch.setitem(VERIFIERS, "ibp", Verifier("unsound", everything))
    monkeypatch.setattr(sys, "argv", ["robust-app", "evaluate", str(finished_run)])
    before = RunDirectory(finished_run).results()
    with pytest.raises(Contradiction, match="not sound"):
        cli.main()
    assert RunDirectory(finished_run).results() == before


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


STAGES = (
    *("--set", "epochs=2", "--set", "milestones=[]", "--set", "natural_epochs=0"),
    *("--set", "adversarial_epochs=0", "--set", "stage_milestones=[]"),
    *("--set", "ramp_epochs=1", "--set", "stages=2", "--set", "stage_epochs=2"),
    *("--set", "batch_size=400", "--set", "pgd_steps=2"),
)


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


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


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


def assert_same_network(one: Path, other: Path, more: tuple[str, ...] = ()) -> None:
    for name in ("checkpoint.pt", "best.pt", "last.pt", *more):
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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "recipes",
            (
                *("digits", "mnist[-MODEL][-EPSILON][-METHOD][-SCHEDULE]", "cifar10[-MODEL]"),
                *("if left out", "dm-large", "0.3", "16-255", "advcrown-ibp", "authors", "short"),
            ),
        ),
        ("models", ("Conv 16 4×4+2", "550,406", *MODELS)),
        ("methods", tuple(METHODS)),
        ("verifiers", tuple(VERIFIERS)),
        ("datasets", ("mnist", "npz:PATH")),
    ],
)
def test_tables_show_what_there_is(robust_app, command, words):
    status, out, _ = robust_app(command)
    assert status == 0
    for word in words:
        assert word in out


def test_the_table_of_recipes_shows_every_choice(robust_app):
    _, out, _ = robust_app("recipes")
    for family in recipes.families():
        for kind in recipes.KINDS:
            for choice in family.choices(kind):
                assert choice in out


@pytest.mark.parametrize("name", ["digits", "mnist-dm-small-0.3-advibp-authors", "cifar10-pgd"])
def test_a_printed_recipe_is_a_file_for_train(robust_app, tmp_path, name):
    status, out, err = robust_app("recipes", name)
    assert (status, err) == (0, "")
    (tmp_path / "mine.toml").write_text(out, encoding="utf-8")
    assert recipes.load(tmp_path / "mine.toml") == recipes.load(name)
    assert recipes.description(tmp_path / "mine.toml") == recipes.description(name)


def test_a_recipe_without_a_description_is_printed_as_it_is(robust_app, tmp_path):
    text = recipes.load("digits").to_toml()
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    assert robust_app("recipes", "mine.toml")[1] == text


def test_a_printed_recipe_trains(robust_app, tmp_path):
    (tmp_path / "mine.toml").write_text(robust_app("recipes", "digits")[1], encoding="utf-8")
    status, out, _ = robust_app("train", "--recipe", "mine.toml", *QUICK, "--stop-after", "1")
    assert status == 0
    assert "run directory: runs/mine-1" in out


def test_printing_an_unknown_recipe_names_the_nearest(robust_app):
    assert_refused(robust_app("recipes", "digit"), "'digit'", "'digits'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "digit"), ("recipe", "'digits'")),
        (("--recipe", ""), ("unknown recipe ''",)),
        (("--recipe", "missing.toml"), ("missing.toml", "cannot be read")),
        (("--recipe", "."), ("recipe .", "ends in .toml")),
        (("--recipe", "x" * 300), ("unknown recipe", "`robust-app recipes` shows")),
        (("--recipe", "a/" * 3000), ("unknown recipe", "`robust-app recipes` shows")),
        (("--set", "lr=1"), ("unknown key 'lr'", "`robust-app recipes digits` shows")),
        (("--seed", "1", "--set", "seed=2"), ("--seed", "or --set seed, not both")),
        (("--epochs", "4", "--set", " epochs =2"), ("--epochs", "or --set epochs, not both")),
        (("--set", "epsilon=9/8"), ("epsilon", "[0, 1]", "1.125")),
        (("--set", "epsilon=8/0"), ("epsilon", "[0, 1]", "'8/0'")),
        (("--set", "attack_steps=50"), ("attack_steps", "10 for advibp", "50")),
        (("--set", "crown_share=[1, 0.5]"), ("crown_share", "[1, 0] for advibp", "[1, 0.5]")),
        (("--set", "stage_epochs=5"), ("stage_epochs", "without stages", "found 5")),
        (("--execution", "fast"), ("--execution 'fast'", "known are 'eager', 'graph', 'compile'")),
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
        (("--set", "stages=4"), ("stages", "at most 3", "4 layers", "found 4")),
        (("--set", "method=latent-adversarial"), ("stages", "at least 1")),
        (("--set", "method=natural"), ("adversarial_epochs", "natural")),
        (("--recipe", "digits-diffai", "--set", "natural_weight=[1, 0]"), ("natural_weight",)),
        (("--recipe", "digits-ibp", "--set", "certified_epochs=2"), ("certified_epochs", "ibp")),
        (("--recipe", "digits-ibp", "--set", "authors_weights=true"), ("authors_weights",)),
        (("--set", "batch_norm=true", "--set", "batch_size=1"), ("batch_size", "at least 2")),
        (("--set", "natural_weight=0.5"), ("natural_weight", "two numbers", "0.5")),
        (("--recipe", "mnist-ibp-authors"), ("mnist-ibp-authors", "nearest")),
        (("--recipe", "mnist-dm-small"), ("mnist", "--data-root")),
        (("--recipe", "mnist-dm-small", "--data-root", "nowhere"), ("nowhere", "--download")),
        (("--set", "dataset=npz:missing.npz"), ("missing.npz",)),
        (("--device", "cuda:99"), ("--device", "99")),
        (("--device", "tpu"), ("--device", "tpu")),
        (("--device", "cpu:7"), ("--device", "cpu:7")),
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


def test_the_version_is_told(robust_app):
    assert robust_app("--version") == (
        0,
        f"robust-app {mogd.__version__}, torch {torch.__version__}\n",
        "",
    )


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


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ((10, 2, 2), (), ("held_out", "5000", "10")),
        ((10, 2, 2), ("held_out=2",), ("batch_size", "8", "256")),
        ((10, 2, 2), ("held_out=2", "batch_size=4"), ("2×2 pixels", "too small", "dm-small")),
        ((10, 8, 8, 2), (), ("x_train", "(10, 8, 8, 2)")),
    ],
)
def test_data_of_another_shape_than_the_recipes_are_refused(
    robust_app, tmp_path, shape, settings, words
):
    x, y = np.full(shape, 9, dtype=np.uint8), np.arange(10) % 2
    np.savez(tmp_path / "tiny.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    arguments = [word for setting in settings for word in ("--set", setting)]
    outcome = robust_app(
        "train", "--recipe", "mnist-dm-small", "--set", "dataset=npz:tiny.npz", *arguments
    )
    assert_refused(outcome, *words)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_trains_on_images_of_another_shape_that_fit(robust_app, tmp_path):
    random = np.random.default_rng(0)
    x, y = random.integers(256, size=(24, 9, 7, 3), dtype=np.uint8), np.arange(24) % 3
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    recipe = ("--recipe", "mnist-short", "--epochs", "1", "--run-dir", "run")
    values = ("dataset=npz:small.npz", "held_out=4", "batch_size=10", "pgd_steps=1")
    arguments = [word for value in values for word in ("--set", value)]
    status, out, err = robust_app("train", *recipe, *arguments)
    assert (status, err) == (0, "")
    assert "24 test images" in " ".join(out.split())  # the path may break the line


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


def test_torchrun_continues_the_run_that_it_starts_again(robust_app, finished_run, monkeypatch):
    again = ("train", *QUICK, "--run-dir", finished_run)
    assert_refused(robust_app(*again), "not empty")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert robust_app(*again)[0] == 0
    way_out = f"as far as a fork may differ: robust-app fork {finished_run} --set KEY=VALUE"
    assert_refused(robust_app(*again, "--seed", "5"), "--resume: the run has", "seed", way_out)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert_refused(robust_app("train", *QUICK), "--run-dir: needed with --max-restarts")


def printed_into(output, *arguments, processes=""):
    """Status and standard error of a command with this standard output."""
    command = [sys.executable, "-m", "robust_app", *arguments]
    done = subprocess.run(
        command,
        env=ONE_THREAD | {"WORLD_SIZE": processes, "PYTHONUNBUFFERED": ""},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr


OUTPUTS = [("recipes",), ("recipes", "digits"), ("--version",)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("processes", ["", "2"])
@pytest.mark.parametrize("arguments", OUTPUTS)
def test_output_that_cannot_be_written_is_one_line_and_status_2(arguments, processes):
    with Path("/dev/full").open("w") as full:
        told = printed_into(full, *arguments, processes=processes)
    assert told == (2, "robust-app: cannot read or write (No space left on device)\n")


@pytest.mark.parametrize("arguments", OUTPUTS)
def test_output_that_nobody_reads_is_one_line_and_status_2(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    told = printed_into(writer, *arguments)
    os.close(writer)
    assert told == (2, "robust-app: standard output: closed by who read it\n")


@pytest.mark.parametrize("to", ["&-", "/dev/full"])
def test_what_is_wrong_has_its_status_where_it_cannot_be_said(to):
    command = f"exec {sys.executable} -m robust_app evaluate nowhere 2>{to}"
    done = subprocess.run(["sh", "-c", command], env=ONE_THREAD, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")


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


def test_a_home_that_nobody_has_is_refused_in_one_line(robust_app):
    outcome = robust_app("train", *QUICK, "--set", "dataset=npz:~nobody-of-that-name/x.npz")
    assert_refused(outcome, "dataset: npz:~nobody-of-that-name/x.npz: no such path")


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


def test_the_model_of_another_run_is_refused(robust_app, finished_run):
    model = checkpoint.load(finished_run / "last.pt")
    model["network"]["0.weight"] = model["network"]["0.weight"][:3].clone()
    checkpoint.save(model, finished_run / "last.pt")
    assert_refused(robust_app("evaluate", finished_run), "last.pt", "another network")


def test_evaluate_refuses_what_it_cannot_use(robust_app, finished_run):
    before = RunDirectory(finished_run).results()
    assert_refused(robust_app("evaluate", "nowhere"), "nowhere", "no run here")
    assert_refused(robust_app("evaluate", finished_run, "--verifier", "ipb"), "ipb", "'ibp'")
    assert_refused(robust_app("evaluate", finished_run, "--epsilon", "-1"), "epsilon", "-1")
    outcome = robust_app("evaluate", finished_run, "--verifier", "ibp,crwon")
    assert_refused(outcome, "crwon", "'crown'")
    outcome = robust_app("evaluate", finished_run, "--images", "361")
    assert_refused(outcome, "images", "360", "361")
    assert_refused(robust_app("evaluate", finished_run, "--images", "0"), "--images")
    assert_refused(robust_app("evaluate", finished_run, "--time-limit", "-1"), "time", "-1")
    assert RunDirectory(finished_run).results() == before


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
