"""The command line as its user meets it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mogd
from robust_app import recipes
from robust_app.methods import METHODS
from robust_app.models import MODELS
from robust_app.run_directory import RunDirectory
from robust_app.verifiers import VERIFIERS
from tests.robust_app.refusals import assert_refused
from tests.robust_app.runs import QUICK

MNIST = Path(__file__).parents[3] / "shared" / "data"


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


@pytest.mark.parametrize(
    "given",
    ["dataset=mnist", "dataset=npz:./mnist.npz", "dataset=idx:data/mnist", "dataset = 'mnist'"],
)
def test_a_run_without_a_recipe_is_named_by_its_data(robust_app, given, monkeypatch):
    monkeypatch.setattr("robust_app.train_command.next_free", lambda _, name: pytest.fail(name))
    with pytest.raises(pytest.fail.Exception, match=r"^mnist$"):
        robust_app("train", "--set", given)


def test_a_run_on_the_root_of_all_files_has_a_name(robust_app, monkeypatch):
    monkeypatch.setattr("robust_app.train_command.next_free", lambda _, name: pytest.fail(name))
    with pytest.raises(pytest.fail.Exception, match=r"^run$"):
        robust_app("train", "--set", "dataset=idx:/")


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


def test_a_recipe_s_file_without_its_ending_is_named(robust_app, tmp_path):
    (tmp_path / "my.toml").touch()
    words = ("recipe my: unknown", "say my.toml")
    assert_refused(robust_app("train", "--recipe", "my"), *words)


def test_an_unknown_command_is_one_line_and_status_2(robust_app):
    assert_refused(robust_app("trian"), "trian")


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


def test_a_bare_call_shows_the_help_and_no_empty_error(robust_app):
    _, out, err = robust_app()
    assert "train" in out + err
    assert "robust-app: \n" not in err


def test_a_home_that_nobody_has_is_refused_in_one_line(robust_app):
    outcome = robust_app("train", *QUICK, "--set", "dataset=npz:~nobody-of-that-name/x.npz")
    assert_refused(outcome, "dataset: npz:~nobody-of-that-name/x.npz: no such path")
