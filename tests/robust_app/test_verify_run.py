"""``robust-app verify-run``: what a run reported, measured again."""

import json
import shutil
from functools import partial
from operator import methodcaller

import numpy as np
import pytest
import torch

from robust_app import checkpoint, environment, loading
from robust_app.environment import FACTS
from robust_app.run_directory import RunDirectory
from robust_app.verify_run import Claim, differences
from tests.robust_app.refusals import assert_refused

TRAIN = (
    *("--epochs", "3", "--set", "batch_size=400", "--set", "pgd_steps=3", "--seed", "1"),
    *("--set", "learning_rate=0.003", "--set", "evaluation_epsilon=0.02"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two evaluations, that nobody changes; its images are its own."""
    return {}


@pytest.fixture
def run(robust_app, tmp_path, made):
    """A copy of it, where the command is called."""
    if not made:  # once, but by way of the command
        random = np.random.default_rng(0)
        images = {
            name: random.integers(256, size=(count, 8, 8), dtype=np.uint8)
            for name, count in (("x_train", 60), ("x_test", 40))
        }
        labels = {f"y{name[1:]}": x.mean((1, 2)) > 127 for name, x in images.items()}
        whole = {name: y.astype(np.int64) for name, y in labels.items()} | images
        np.savez(tmp_path / "mine.npz", **whole)
        options = ("--set", "dataset=npz:mine.npz", "--set", "held_out=20", "--set")
        assert robust_app("train", *TRAIN, *options, "batch_size=20", "--run-dir", "run")[0] == 0
        more = ("--epsilon", "0.004", "--verifier", "ibp,crown-ibp", "--images", "15")
        assert robust_app("evaluate", "run", *more)[0] == 0
        made["data"] = whole
        for file in (tmp_path / "run").iterdir():
            made[file.name] = file.read_bytes()
    (tmp_path / "run").mkdir(exist_ok=True)
    for name in made.keys() - {"data"}:
        (tmp_path / "run" / name).write_bytes(made[name])
    config = tmp_path / "run" / "config.toml"
    lines = config.read_text().splitlines()
    lines[0] = f'dataset = "npz:{tmp_path / "mine.npz"}"'
    config.write_text("\n".join(lines) + "\n")
    np.savez(tmp_path / "mine.npz", **made["data"])
    return RunDirectory(tmp_path / "run")


def rewrite(run, name, change):
    """Change the entries of ``environment.json`` or ``results.json``."""
    file = run.path / name
    entries = json.loads(file.read_text())
    for entry in entries:
        change(entry)
    file.write_text(json.dumps(entries))


def relabel(file, **changes):
    """Change what a file of torch.save says."""
    checkpoint.save(checkpoint.load(file) | changes, file)


def test_a_run_as_it_was_made_agrees_in_every_figure(robust_app, run):
    before = {file.name: file.read_bytes() for file in run.path.iterdir()}
    status, out, err = robust_app("verify-run", "run")
    assert (status, err) == (0, "")
    kept = {checkpoint.load(file)["epoch"] for file in (run.best_file, run.last_file)}
    compared = 2 * len(kept) + 6 * len(run.results())
    assert f"{compared} figures compared: none differ\n" in out
    assert out.count(" same ") == compared
    assert "off by" not in out
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before


@pytest.fixture
def staged(robust_app, run):
    """A run with layer-wise stages; two of the three have ended."""
    data = run.config().dataset
    options = ("--set", f"dataset={data}", "--set", "held_out=20", "--run-dir", "staged")
    stages = ("stages=3", "stage_epochs=1", "stage_milestones=[]")
    given = (f"--set={setting}" for setting in ("batch_size=20", *stages))
    assert robust_app("train", *TRAIN, *options, *given, "--stop-after", "5")[0] == 0
    return RunDirectory(run.path.parent / "staged")


def test_networks_of_stages_are_measured_too(robust_app, staged):
    names = ("best", "last", "stage-0", "stage-1", "stage-2")
    kept = {checkpoint.load(staged.path / f"{name}.pt")["epoch"] for name in names}
    assert {3, 4, 5} <= kept
    status, out, _ = robust_app("verify-run", "staged")
    assert (status, f"{2 * len(kept)} figures compared: none differ\n" in out) == (0, True)
    saved = checkpoint.load(staged.stage_file(1))
    shutil.copy(staged.stage_file(2), staged.stage_file(1))
    words = "stage-1.pt: expected the network of epoch 4, found the network of epoch 5"
    assert_refused(robust_app("verify-run", "staged"), words)
    final = [key for key in saved["network"] if key.endswith("weight")][-1]
    saved["network"][final].neg_()
    checkpoint.save(saved, staged.stage_file(1))
    assert robust_app("verify-run", "staged")[0] == 1
    staged.stage_file(1).unlink()
    words = "stage-1.pt: expected the network of epoch 4, found none"
    assert_refused(robust_app("verify-run", "staged"), words)


def test_exchanged_networks_are_noticed(robust_app, run):
    relabel(run.best_file, epoch=1)
    metrics = run.metrics()
    metrics[0] |= {"verified_error": 0.0}
    run.write_metrics(metrics)
    best, last = run.best_file.read_bytes(), run.last_file.read_bytes()
    run.best_file.write_bytes(last)
    run.last_file.write_bytes(best)
    words = "best.pt: expected the network of epoch 1, found the network of epoch 3"
    assert_refused(robust_app("verify-run", "run"), words)


def test_the_last_network_is_that_of_the_last_epoch_where_nothing_is_held_out(robust_app, run):
    options = ("--set", f"dataset={run.config().dataset}", "--set", "held_out=0")
    made = robust_app("train", *TRAIN, *options, "--set", "batch_size=20", "--run-dir", "all")
    assert made[0] == 0, made
    directory = RunDirectory(run.path.parent / "all")
    assert robust_app("verify-run", "all")[0] == 0
    relabel(directory.last_file, epoch=2)
    words = "last.pt: expected the network of epoch 3, found the network of epoch 2"
    assert_refused(robust_app("verify-run", "all"), words)


def test_a_figure_that_is_not_so_is_told_with_its_distance(robust_app, run):
    rewrite(run, "environment.json", lambda made: made.update(commit="1a2b"))
    rewrite(run, "results.json", lambda entry: entry["environment"].update(commit="1a2b"))
    results = run.results()
    results[-1]["pgd_error"] -= 20
    run.results_file.write_text(json.dumps(results))
    metrics = run.metrics()
    metrics[-1]["standard_error"] += 5
    run.write_metrics(metrics)
    status, out, _ = robust_app("verify-run", "run")
    assert status == 1
    assert out.count("off by") == 2
    assert "off by +20" in out
    assert "off by -5" in out
    assert "figures compared: 2 differ\n" in out
    assert "made in another environment" in out
    assert "commit: 1a2b, here" in out


@pytest.mark.parametrize("left", [1, 2, 0])
def test_what_exact_left_to_its_time_limit_may_differ_by_as_much(robust_app, run, left):
    """Of an evaluation that left images undecided which are falsified or certified now."""
    pytest.importorskip("scipy")
    (run.path / "results.json").unlink()
    more = ("--verifier", "ibp,exact", "--images", "10", "--epsilon", "0.02")
    assert robust_app("evaluate", "run", *more)[0] == 0
    results = run.results()
    for entry in results:
        assert entry["undecided"] == 0
        entry["falsified"] -= 1
        entry["certified"] -= 1
        entry["verified_error"] += 10
        entry["undecided"] = left
    run.results_file.write_text(json.dumps(results))
    status, out, _ = robust_app("verify-run", "run")
    assert out.count("off by +1, left by time") == (2 * len(results) if left else 0)
    assert out.count("off by -10, left by time") == (len(results) if left else 0)
    assert ("exact left undecided at its time limit" in out) == (left > 0)
    assert status == (0 if left else 1)


@pytest.mark.parametrize("figure", ["certified", "undecided"])
def test_a_count_that_is_not_so_is_told(robust_app, run, figure):
    results = run.results()
    results[-1][figure] += 1
    run.results_file.write_text(json.dumps(results))
    status, out, _ = robust_app("verify-run", "run")
    assert status == 1
    assert out.count("off by -1") == 1
    assert "figures compared: 1 differs\n" in out


@pytest.mark.parametrize("change", ["seed = 1/seed = 5", "regularization = 0.5/regularization = 2"])
@pytest.mark.parametrize(
    "command", [("verify-run",), ("evaluate",), ("export",), ("train", "--resume", "--run-dir")]
)
def test_a_changed_configuration_is_refused(robust_app, run, change, command):
    old, new = change.split("/")
    text = run.config_file.read_text()
    assert old in text
    run.config_file.write_text(text.replace(old, new))
    name = old.split()[0]
    words = ("made with another configuration than config.toml has", f"({name}: ")
    assert_refused(robust_app(*command, "run"), *words)


def test_another_network_is_noticed(robust_app, run):
    saved = checkpoint.load(run.last_file)
    final = [key for key in saved["network"] if key.endswith("weight")][-1]
    saved["network"][final].neg_()
    checkpoint.save(saved, run.last_file)
    if run.best_file.exists() and checkpoint.load(run.best_file)["epoch"] == saved["epoch"]:
        checkpoint.save(saved, run.best_file)
    rewrite(run, "environment.json", lambda made: made.pop("commit"))
    rewrite(run, "results.json", lambda entry: entry["environment"].pop("commit"))
    status, out, _ = robust_app("verify-run", "run")
    assert status == 1
    assert "off by" in out
    assert "the environment is the same: the run's files were changed, or the code" in out


def test_the_environment_is_named_where_it_is_another_one(robust_app, run):
    def elsewhere(made):
        made["packages"]["torch"] = "1.0"
        made["threads"] = 77
        made["settings"]["mkldnn"] = False

    rewrite(run, "environment.json", elsewhere)
    status, out, _ = robust_app("verify-run", "run")
    assert status == 0  # a difference that makes no difference
    for line in ("torch: 1.0, here", "threads: 77, here 1", "mkldnn: False, here True"):
        assert f"  {line}" in out
        assert out.count(line) == 1


def test_other_data_are_refused_in_one_line(robust_app, run, tmp_path, made):
    changed = {name: array.copy() for name, array in made["data"].items()}
    changed["x_test"][3, 4, 5] ^= 1
    np.savez(tmp_path / "mine.npz", **changed)
    before = run.results()
    for command in (
        *(("verify-run", "run"), ("train", "--run-dir", "run", "--resume")),
        *(("evaluate", "run"), ("export", "run")),
    ):
        assert_refused(robust_app(*command), "run: made on other data than these", "--data-root")
    assert run.results() == before
    rewrite(run, "environment.json", lambda made: made.pop("data"))  # known from the results
    assert_refused(robust_app("verify-run", "run"), "results.json: entry 1 is of other data")


def test_a_run_of_an_older_version_is_verified_all_the_same(robust_app, run):
    def forget(made):
        for name in ("data", "processor", "cpu_capability", "settings", "cuda", "environment"):
            made.pop(name, None)

    rewrite(run, "environment.json", forget)
    rewrite(run, "results.json", forget)
    status, out, _ = robust_app("verify-run", "run")
    assert status == 0
    assert "none differ" in out
    run.environment_file.unlink()
    assert robust_app("verify-run", "run")[0] == 0


def test_what_cannot_be_compared_is_said(robust_app, run):
    def later(entry):
        entry["network"] = "last (epoch 99)"

    rewrite(run, "results.json", later)
    status, out, _ = robust_app("verify-run", "run")
    assert status == 0
    assert out.count("this network is not kept") == 6 * len(run.results())
    measured = dict.fromkeys(("standard_error", "verified_error"))
    run.write_metrics([line | measured for line in run.metrics()])  # so that nothing is left
    run.best_file.unlink()
    assert_refused(robust_app("verify-run", "run"), "nothing to verify")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: shutil.rmtree(run.path), ("no run here",)),
        (lambda run: (run.best_file.unlink(), run.last_file.unlink()), ("no network is saved",)),
        (
            lambda run: rewrite(run, "results.json", lambda entry: entry.pop("pgd_error")),
            ("results.json: damaged", "entry 1", "pgd_error"),
        ),
        (
            lambda run: rewrite(run, "results.json", lambda entry: entry.update(network="mine")),
            ("results.json: damaged", "'mine'"),
        ),
        (
            lambda run: rewrite(run, "results.json", lambda entry: entry.update(verifiers=["no"])),
            ("unknown verifier 'no'",),
        ),
        *(
            (
                partial(rewrite, name="results.json", change=methodcaller("update", change)),
                ("results.json: damaged", "entry 1", *change),
            )
            for change in (
                {"standard_error": "4"},
                {"falsified": True},
                {"pgd_error": None},
                {"environment": "packages"},
                {"environment": None},
                {"pgd_steps": "10"},
                {"images": -1},
                {"epsilon": [0.1]},
                {"network": 1},
            )
        ),
        (
            lambda run: rewrite(run, "results.json", lambda entry: entry.update(verifiers=[1])),
            ("results.json: damaged", "entry 1", "unknown verifier '1'"),
        ),
        (
            lambda run: rewrite(run, "environment.json", lambda made: made.update(data=5)),
            ("made on other data than these (5…",),
        ),
        (
            lambda run: run.metrics_file.write_text(""),
            ("metrics.jsonl: 3 epochs are done, found the metrics of 0",),
        ),
        (lambda run: run.checkpoint_file.unlink(), ("checkpoint.pt: cannot be read",)),
        (
            lambda run: run.checkpoint_file.write_bytes(run.checkpoint_file.read_bytes()[:-99]),
            ("checkpoint.pt: not a checkpoint of robust-app, or damaged",),
        ),
        (
            lambda run: checkpoint.save(loading.content(run.config()), run.checkpoint_file),
            ("checkpoint.pt: damaged (it does not say how many epochs)",),
        ),
        (
            lambda run: checkpoint.save({"format": "robust-app 1"}, run.checkpoint_file),
            ("checkpoint.pt: holds no configuration that this version reads ('config')",),
        ),
        (
            lambda run: relabel(run.best_file, epoch=99),
            ("best.pt: expected the network of epoch", "found the network of epoch 99;"),
        ),
        (
            # As a kill leaves it, between the checkpoint of an epoch and its networks.
            lambda run: [relabel(file, epoch=1) for file in (run.best_file, run.last_file)],
            ("expected the network of epoch", "found the network of epoch 1;", "--resume makes it"),
        ),
        (
            lambda run: run.last_file.unlink(),
            ("last.pt: expected the network of epoch 3, found none",),
        ),
        (
            lambda run: shutil.copy(run.last_file, run.stage_file(0)),
            ("stage-0.pt: expected none, found the network of epoch 3",),
        ),
        (lambda run: run.best_file.unlink(), ("best.pt: missing, the network of epoch",)),
        (
            lambda run: run.metrics_file.write_text(run.metrics_file.read_text()[:-40]),
            ("metrics.jsonl: cannot be read", "(line 3, column"),
        ),
        (
            lambda run: rewrite(run, "results.json", lambda entry: entry.update(pgd_steps=10**7)),
            ("results.json: damaged", "an integer from 1 to 1000000, found 10000000"),
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(robust_app, run, damage, words):
    damage(run)
    assert_refused(robust_app("verify-run", "run"), *words)


def test_every_fact_is_in_the_environment_and_a_difference_is_told_once():
    here = environment.describe(torch.device("cpu"), 1, 0, None)
    assert set(FACTS) - {"execution"} <= here.keys()  # which a run adds itself
    clean = here | {"commit": None}
    claims = [Claim("results.json, 1", 1, "pgd_error", 1.0, 1.0, clean | {"threads": -1})] * 2
    assert differences(claims, clean) == [f"threads: -1, here {here['threads']}"]
    assert differences([Claim("", 1, "pgd_error", 1.0, 1.0, {})], clean) == []
