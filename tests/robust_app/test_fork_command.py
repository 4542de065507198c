"""Runs that go on from where another is."""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from robust_app import checkpoint
from robust_app.config import Config
from robust_app.run_directory import RunDirectory
from tests.robust_app.refusals import assert_refused
from tests.robust_app.runs import SHI, full_strength, short_config

CROWN = {"method": "crown-ibp", "adversarial_epochs": 0.0}
OWN = ("seconds", "taken_over")
STAGES = {"stages": 1, "stage_epochs": 2, "stage_learning_rate": 1e-3}


@pytest.fixture
def train(robust_app):
    """Train a run of this name, made with a configuration or to be resumed."""

    def call(name, config=None, *options):
        made = ["--resume"]
        if config is not None:
            Path("recipe.toml").write_text(config.to_toml())
            made = ["--recipe", "recipe.toml"]
        outcome = robust_app("train", *made, "--run-dir", name, *options)
        assert outcome[0] == 0, outcome
        return RunDirectory(Path(name))

    return call


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two of the three epochs of a run that nobody changes."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "recipe.toml").write_text(short_config().to_toml())
    options = ["--recipe", "recipe.toml", "--run-dir", "parent", "--stop-after", "2"]
    command = [sys.executable, "-m", "robust_app", "train", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "parent"


@pytest.fixture
def parent(template, tmp_path):
    """The folder ``parent`` with that run."""
    return RunDirectory(Path(shutil.copytree(template, tmp_path / "parent")))


def certified_first(**changes):
    """Both losses after two epochs of the certified one, as where a front is looked for."""
    config = {"certified_epochs": 2.0, "epochs": 4, "batch_size": 200, "held_out": 141, **SHI}
    return full_strength(**{"method": "advibp"} | config | changes)


def contents(folder):
    """What each file of a folder holds."""
    files = (file for file in Path(folder).iterdir() if file.name != ".lock")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def network_of(run, file="last_file"):
    saved = checkpoint.load(getattr(run, file))
    return saved["epoch"], torch.nn.utils.parameters_to_vector(saved["network"].values())


def assert_same(run, other):
    """To the bits, and epoch by epoch but for the time it took."""
    assert torch.equal(network_of(run)[1], network_of(other)[1])
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in OWN} for line in each.metrics()]
        for each in (run, other)
    )
    assert ours == theirs


def test_a_fork_ends_as_the_run_that_had_its_settings_all_along(robust_app, train):
    train("parent", certified_first(), "--stop-after", "2")
    before = contents("parent")
    changes = ("--set", "method=weighted-sum", "--set", "preference=[4, 1]")
    status, out, err = robust_app("fork", "parent", "--run-dir", "fork", *changes)
    assert status == 0, err
    assert contents("parent") == before
    assert out.splitlines() == [
        "run directory: fork",
        "forked after epoch 2 of parent (method: weighted-sum, not advibp; "
        "preference: [4, 1], not [1, 1])",
        "epoch 3 begins with ε 0.0300 and a learning rate of 0.001",
        "continue with: robust-app train --run-dir fork --resume",
    ]
    forked = train("fork")
    config = certified_first(method="weighted-sum", preference=(4.0, 1.0))
    assert forked.config() == config
    assert_same(forked, train("whole", config))
    assert not torch.equal(network_of(forked)[1], network_of(train("parent"))[1])


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("authors_weights=true", {"authors_weights": True}),
        ("moment_decay=[0.5, 0.6]", {"moment_decay": (0.5, 0.6)}),
    ],
)
def test_what_makes_the_moments_may_change_before_there_are_any(robust_app, train, setting, change):
    train("parent", certified_first(), "--stop-after", "2")
    assert robust_app("fork", "parent", "--run-dir", "fork", "--set", setting)[0] == 0
    forked = train("fork")
    assert_same(forked, train("whole", certified_first(**change)))
    assert not torch.equal(network_of(forked)[1], network_of(train("parent"))[1])


def test_without_changes_it_goes_on_as_its_parent_does(robust_app, train, parent):
    status, out, _ = robust_app("fork", "parent")
    assert (status, "(nothing changed)" in out) == (0, True)
    assert_same(train("runs/parent-fork-1"), train("parent"))


def test_it_says_where_it_comes_from(robust_app, train, parent):
    robust_app("fork", "parent", "--run-dir", "fork", "--set", "learning_rate=1e-4")
    fork = RunDirectory(Path("fork"))
    assert fork.environments() == parent.environments()
    [origin] = fork.origin()
    assert origin["command"][1:3] == ["fork", "parent"]
    assert (origin["run"], origin["epochs"]) == (str(Path("parent").resolve()), 2)
    assert Config.from_mapping(tomllib.loads(origin["config"])) == parent.config()
    train("fork")
    assert robust_app("verify-run", "fork")[0] == 0
    robust_app("fork", "fork", "--run-dir", "again", "--set", "epochs=4")
    again = RunDirectory(Path("again")).origin()
    assert again[0] == origin
    assert [made["epochs"] for made in again] == [2, 3]


def test_a_run_that_is_done_trains_for_longer(robust_app, train):
    train("parent", short_config(), "--set", "pgd_steps=1")
    fewer = ("--set", "epochs=2", "--set", "milestones=[1]")
    stages = ("--set", "stages=3", "--set", "stage_epochs=2", "--set", "stage_milestones=[]")
    for options, found in (((), 3), (fewer[:2], 2), (fewer, 2), ((*fewer, *stages), 2)):
        outcome = robust_app("fork", "parent", "--run-dir", "fork", *options)
        words = f"epochs: expected enough for more than the 3 epochs that are done, found {found}"
        assert_refused(outcome, words, "give it more epochs")
    assert not Path("fork/config.toml").exists()
    assert robust_app("fork", "parent", "--run-dir", "more", "--set", "epochs=5")[0] == 0
    more = train("more")
    assert [epoch["epoch"] for epoch in more.metrics()] == [1, 2, 3, 4, 5]
    assert more.results()[-1]["network"].endswith("last (epoch 5)")
    assert_same(more, train("whole", short_config(), "--set", "epochs=5", "--set", "pgd_steps=1"))


def test_the_best_network_is_one_of_its_own(robust_app, train, parent):
    metrics = parent.metrics()
    metrics[0] |= {"verified_error": 0.0, "standard_error": 0.0}
    later = metrics[-1] | {"epoch": 3}  # of a parent that has gone on meanwhile
    parent.write_metrics([*metrics, later])
    robust_app("fork", "parent", "--run-dir", "fork")
    fork = RunDirectory(Path("fork"))
    assert fork.metrics() == [line | {"taken_over": True} for line in metrics]
    assert not fork.best_file.exists()
    outcome = robust_app("evaluate", "fork", "--pgd-steps", "1")
    assert_refused(outcome, "fork/last.pt: missing; a run has it once it has trained")
    train("fork")
    assert network_of(fork, "best_file")[0] == 3
    assert [line.get("taken_over", False) for line in fork.metrics()] == [True, True, False]
    assert robust_app("verify-run", "fork")[0] == 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("dataset=mnist", ["dataset: a fork keeps its parent's, digits", "found mnist"]),
        ("model=dm-small", ["model: a fork keeps its parent's", "the checkpoint is of it"]),
        ("batch_norm=true", ["batch_norm: a fork keeps its parent's, false"]),
        ("ibp_initialization=true", ["ibp_initialization: a fork", "is trained already"]),
        ("seed=1", ["seed: a fork keeps its parent's, 0: it draws the held-out images", "found 1"]),
        ("held_out=100", ["held_out: a fork keeps its parent's, 141"]),
        ("evaluation_epsilon=0.2", ["evaluation_epsilon: a fork keeps", "at that radius"]),
        ("moment_decay=[0.1, 0.1]", ["moment_decay: a fork keeps", "moments are kept by it"]),
        ("reference_fan_in=100", ["reference_fan_in: a fork keeps"]),
        ("authors_weights=true", ["authors_weights: a fork keeps"]),
        ("natural_epochs=0.25", ["natural_epochs: a fork keeps", "count from their end"]),
        ("adversarial_epochs=0.25", ["adversarial_epochs: a fork keeps"]),
        ("attack_steps=3", ["attack_steps: expected 10 for advibp, found 3"]),
        ("crown_share=[0.5, 0.5]", ["crown_share: expected [1, 0] for advibp"]),
        (
            "method=ibp",
            ["adversarial_epochs: expected 0 for ibp, found 0.5, which a fork cannot change"],
        ),
        (
            "milestones=[1.5]",
            ["milestones: expected its parent's, [2], or what changes the epochs after the 2 that"],
        ),
        ("certified_epochs=1", ["certified_epochs: expected its parent's, 0"]),
        ("box_regularizers=1", ["box_regularizers: expected its parent's, 0"]),
        ("colour=red", ["unknown key 'colour'"]),
    ],
)
def test_what_a_fork_cannot_change_is_refused(robust_app, parent, setting, words):
    assert_refused(robust_app("fork", "parent", "--run-dir", "fork", "--set", setting), *words)
    assert not Path("fork/config.toml").exists()


@pytest.mark.parametrize(
    "setting",
    ["ramp_epochs=0.5", "certified_epochs=1.25", "milestones=[]"],
    ids=["c_t falls from its end on", "it ends later", "the one at 2 is yet to come"],
)
def test_a_setting_of_the_schedules_that_still_matters_is_taken(robust_app, parent, setting):
    outcome = robust_app("fork", "parent", "--run-dir", "fork", "--set", setting)
    assert outcome[0] == 0, outcome


@pytest.mark.parametrize(
    ("parent", "settings"),
    [
        # diffai takes twice the same.
        (
            {"method": "ibp", "natural_weight": (1.0, 0.5)},
            ["method=diffai", "natural_weight=[0.5, 0.5]"],
        ),
        # There is no room for the parent's.
        ({"method": "advibp", "certified_epochs": 4.0}, ["epochs=3", "certified_epochs=2.5"]),
        ({"method": "ibp", "milestones": (4.0,)}, ["epochs=3", "milestones=[]"]),
    ],
    ids=["natural_weight", "certified_epochs", "milestones"],
)
def test_a_change_that_another_setting_needs_is_taken(robust_app, train, parent, settings):
    train("parent", full_strength(**parent), "--stop-after", "1")
    sets = (f"--set={setting}" for setting in settings)
    outcome = robust_app("fork", "parent", "--run-dir", "fork", *sets)
    assert outcome[0] == 0, outcome


def test_a_parent_in_its_stages_keeps_them(robust_app, train):
    train("parent", short_config(**STAGES), "--stop-after", "4")
    for setting in ("epochs=4", "stage_epochs=3"):
        outcome = robust_app("fork", "parent", "--run-dir", "no", "--set", setting)
        assert_refused(outcome, "a layer-wise stage has begun")
    outcome = robust_app("fork", "parent", "--run-dir", "no", "--set", "stages=0")
    assert_refused(outcome, "stages: expected enough for more than the 4 epochs", "found 0")
    outcome = robust_app("fork", "parent", "--run-dir", "no", "--set", "learning_rate=1e-4")
    assert_refused(outcome, "learning_rate: expected its parent's, 0.005, or what changes")
    options = ("--run-dir", "fork", "--set", "stage_learning_rate=1e-4")
    assert robust_app("fork", "parent", *options)[0] == 0
    assert [epoch["stage"] for epoch in train("fork").metrics()] == [0, 0, 0, 1, 1]


def test_a_run_that_is_done_is_followed_by_stages(robust_app, train):
    fewer = ("--set", "pgd_steps=1")
    train("parent", short_config(), *fewer)
    stages = STAGES | {"stage_milestones": "[1]"}
    changes = (f"--set={name}={value}" for name, value in stages.items())
    status, _, err = robust_app("fork", "parent", "--run-dir", "fork", *changes)
    assert status == 0, err
    fork = train("fork")
    assert [line["stage"] for line in fork.metrics()] == [0, 0, 0, 1, 1]
    whole = short_config(**STAGES, stage_milestones=(1.0,))
    assert_same(fork, train("whole", whole, *fewer))


def test_a_run_whose_stages_are_done_is_followed_by_more(robust_app, train):
    few = ("--set", "pgd_steps=1")
    train("parent", short_config(**STAGES), *few)
    assert_refused(
        robust_app("fork", "parent"),
        "stages: expected enough for more than the 5 epochs that are done, found 1",
        "give it more stages",
    )
    assert robust_app("fork", "parent", "--run-dir", "fork", "--set", "stages=2")[0] == 0
    fork = train("fork")
    assert_same(fork, train("whole", short_config(**STAGES | {"stages": 2}), *few))
    # The networks of epochs that were taken over are the parent's, but for the one it begins with.
    assert sorted(file.name for file in fork.path.glob("stage-*")) == ["stage-1.pt", "stage-2.pt"]
    assert robust_app("verify-run", "fork")[0] == 0


@pytest.mark.parametrize("setting", ["authors_weights=true", "moment_decay=[0.5, 0.6]"])
def test_what_makes_the_moments_may_change_where_a_stage_begins(robust_app, train, setting):
    train("parent", short_config(**STAGES), "--stop-after", "3")
    assert robust_app("fork", "parent", "--run-dir", "fork", "--set", setting)[0] == 0
    assert robust_app("fork", "parent", "--run-dir", "same")[0] == 0
    fork, same, parent = (train(name) for name in ("fork", "same", "parent"))
    assert_same(same, parent)
    assert not torch.equal(network_of(fork)[1], network_of(parent)[1])


def test_nothing_is_overwritten(robust_app, parent):
    before = contents("parent")
    assert_refused(robust_app("fork", "parent", "--run-dir", "parent"), "parent: not empty")
    assert contents("parent") == before


def test_a_parent_without_what_it_takes_is_refused(robust_app, parent):
    assert_refused(robust_app("fork", "nothing"), "nothing: no run here")
    whole = parent.metrics()
    parent.write_metrics(whole[:1])
    assert_refused(robust_app("fork", "parent"), "metrics.jsonl: expected 2 epochs, found 1")
    parent.write_metrics(whole)
    saved = checkpoint.load(parent.checkpoint_file)
    for damage, words in (
        ({"epochs_done": "two"}, "epochs_done: expected"),
        ({"epochs_done": 9}, "epochs_done: expected"),
        ({"optimizer": {}}, "'moments'"),
        ({"optimizer": None}, "'NoneType' object is not subscriptable"),
    ):
        checkpoint.save(saved | damage, parent.checkpoint_file)
        assert_refused(robust_app("fork", "parent"), f"checkpoint.pt: damaged ({words}")
    other = short_config(learning_rate=0.5).to_toml()
    checkpoint.save(saved | {"config": other}, parent.checkpoint_file)
    assert_refused(robust_app("fork", "parent"), "checkpoint.pt: made with another configuration")
    parent.checkpoint_file.unlink()
    assert_refused(robust_app("fork", "parent"), "checkpoint.pt: cannot be read")


def test_a_fork_that_is_broken_off_is_no_run(robust_app, parent, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "write_origin", stop)  # before the last file
    assert robust_app("fork", "parent", "--run-dir", "fork")[0] == 130
    assert_refused(robust_app("train", "--run-dir", "fork", "--resume"), "fork: no run here")


def test_a_refused_fork_leaves_nothing(robust_app, parent):
    assert robust_app("fork", "parent", "--set", "seed=1")[0] == 2
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_used_is_refused(robust_app, parent):
    fork = RunDirectory(Path("fork"))
    with fork.locked():
        assert_refused(robust_app("fork", "parent", "--run-dir", "fork"), "fork: in use by another")
    long = 250 * "x"
    assert_refused(
        robust_app("fork", "parent", "--run-dir", 300 * "x"), "cannot be used (File name"
    )
    assert_refused(robust_app("fork", "parent", "--run-dir", "parent/fork"), "lies in the run that")
    parent.path.rename(long)
    Path("runs").mkdir()
    assert_refused(
        robust_app("fork", long),
        "--run-dir: needed, for no folder can be called",
        "(File name too long",
    )


def test_moments_are_taken_over(robust_app, train):
    train("parent", certified_first(), "--stop-after", "3")  # an epoch of both losses
    for source, name, method in (("parent", "sum", "weighted-sum"), ("sum", "back", "advibp")):
        assert robust_app("fork", source, "--run-dir", name, "--set", f"method={method}")[0] == 0
    assert_same(train("back"), train("parent"))
    weights = [line["adversarial_weight"] for line in train("sum").metrics()[2:]]
    assert weights[0] != weights[1] == 1.0
    assert robust_app("plot", "parent", "sum")[0] == 0


def test_one_of_several_processes_forks(robust_app, parent, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert robust_app("fork", "parent") == (0, "", "")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("origin.json", lambda text: text[:-9], "origin.json: cannot be read"),
        (
            "origin.json",
            lambda text: text.replace('"epochs": 2', '"epochs": "two"'),
            "origin.json: damaged (epochs is no int)",
        ),
        (
            "origin.json",
            lambda text: text.replace('"epochs": 2', '"epochs": 1'),
            "origin.json: says that 1 epochs were taken over, metrics.jsonl says 2",
        ),
        ("origin.json", lambda _: "[]", "says that 0 epochs were taken over"),
        (
            "metrics.jsonl",
            lambda text: text.replace(', "taken_over": true', "", 1),
            "metrics.jsonl: damaged (taken_over is not of the first epochs)",
        ),
        (
            "metrics.jsonl",
            lambda text: text.replace('"taken_over": true', '"taken_over": "no"'),
            "metrics.jsonl: damaged (taken_over is not of the first epochs)",
        ),
    ],
)
def test_damage_of_what_it_comes_from_is_noticed(robust_app, train, parent, name, damage, words):
    robust_app("fork", "parent", "--run-dir", "fork")
    fork = train("fork")
    file = fork.path / name
    file.write_text(damage(file.read_text()))
    assert_refused(robust_app("verify-run", "fork"), words)


def test_what_verifies_the_held_out_images_stays(robust_app, train):
    train("parent", short_config(**CROWN, crown_share=(1.0, 1.0)), "--stop-after", "2")
    words = ["crown_share: a fork keeps what verifies", "ibp, crown-ibp", "found ibp"]
    outcome = robust_app("fork", "parent", "--set", "crown_share=[1, 0]")
    assert_refused(outcome, *words)
    outcome = robust_app(
        "fork", "parent", "--set", "method=advcrown-ibp", "--set", "crown_share=[1, 0]"
    )
    assert_refused(outcome, "method: a fork keeps what verifies")


def test_divergences_and_the_learning_rate_that_they_left_are_taken_over(robust_app, train, parent):
    parent.add_divergence("epoch 1, batch 2", 0.5)
    saved = checkpoint.load(parent.checkpoint_file)
    checkpoint.save(saved | {"learning_rate_scale": 0.5}, parent.checkpoint_file)
    known = parent.divergences()
    parent.add_divergence("epoch 3, batch 1", 0.25)  # of a parent that is about to go back
    out = robust_app("fork", "parent", "--run-dir", "fork")[1]
    assert "a learning rate of 0.0005, 0.5 of its schedule's" in out
    fork = train("fork")
    assert fork.divergences() == known
    assert fork.metrics()[-1]["learning_rate_scale"] == 0.5
