"""``robust-app export`` as its user meets it."""

import csv
import re
import sys

import pytest

from robust_app import checkpoint
from tests.robust_app.refusals import assert_refused


def test_it_says_what_it_wrote(robust_app, digits_run, tmp_path):
    status, out, err = robust_app("export", digits_run, "--indices", "3,1,3", "--out", "out")
    assert (status, err) == (0, "")
    assert "best network (epoch 1): logits by ONNX Runtime and by torch differ by up to" in out
    assert "2 properties at ε = 0.003: " in out
    assert "by PGD and ibp" in out
    assert "written to out" in out
    with (tmp_path / "out" / "instances.csv").open() as file:
        assert [row[1:] for row in csv.reader(file)] == [
            ["vnnlib/image-3.vnnlib", "60"],
            ["vnnlib/image-1.vnnlib", "60"],
        ]


def test_images_are_those_that_evaluate_draws(robust_app, digits_run, tmp_path):
    options = ("--epsilon", "0.01", "--verifier", "ibp,crown", "--images", "30", "--out", "out")
    status, out, _ = robust_app("export", digits_run, *options, "--time-limit", "5")
    assert status == 0
    assert "by PGD and ibp, crown" in out
    verdicts = (tmp_path / "out" / "verdicts.csv").read_text()
    model = ("--dataset", "digits", "--pgd-steps", "5", "--output", "results.json")
    _, table, _ = robust_app("evaluate", "out/model.onnx", *options[:-2], *model)
    [row] = [line.split() for line in table.splitlines() if line.strip().startswith("out/model")][
        1:2
    ]
    counts = [verdicts.count(f",{word}\n") for word in ("certified", "falsified", "undecided")]
    assert row[-3:] == [str(count) for count in counts]
    assert sum(counts) == 30
    assert counts[0] > 0


def test_by_default_it_lies_in_the_run(robust_app, digits_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file in ("config.toml", "best.pt"):
        (run / file).write_bytes((digits_run / file).read_bytes())
    assert robust_app("export", "run", "--images", "1")[0] == 0
    assert (run / "export" / "model.onnx").exists()
    assert_refused(robust_app("export", "run", "--images", "1"), "run/export", "not empty", "--out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--indices", "0,360"), ("--indices", "0 to 359", "'360'")),
        (("--indices", "-1"), ("--indices", "'-1'")),
        (("--indices", "1,,2"), ("--indices", "''")),
        (("--indices", "1", "--images", "2"), ("--indices", "not both")),
        (("--images", "361"), ("images", "360", "361")),
        (("--images", "0"), ("--images",)),
        (("--epsilon", "1.5"), ("epsilon", "[0, 1]", "1.5")),
        (("--epsilon", "8/0"), ("--epsilon", "8/255", "'8/0'")),
        (("--indices", "1" * 5000), ("--indices", "0 to 359", "…")),
        (("--time-limit", "0"), ("--time-limit", "positive", "0.0")),
        (("--time-limit", "nan"), ("--time-limit", "positive", "nan")),
        (("--network", "lost"), ("--network", "'lost'", "'last'")),
        (("--network", "last"), ("last.pt", "missing; a run has it once it has trained")),
        (("--verifier", "ibq"), ("ibq", "'ibp'")),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(
    robust_app, digits_run, tmp_path, options, words
):
    assert_refused(robust_app("export", digits_run, *options, "--out", "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused(robust_app):
    assert_refused(robust_app("export", "."), "no run here", "config.toml")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_its_packages_it_says_what_to_install(
    robust_app, digits_run, tmp_path, monkeypatch, package
):
    monkeypatch.setitem(sys.modules, package, None)
    outcome = robust_app("export", digits_run, "--out", "out")
    assert_refused(outcome, "pip install onnx onnxruntime")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_best_network_exports_its_last(robust_app, tmp_path, digits_run):
    run = tmp_path / "run"
    run.mkdir()
    config = (digits_run / "config.toml").read_text()
    config = re.sub("(?m)^held_out = .*", "held_out = 0", config)
    (run / "config.toml").write_text(config)
    checkpoint.save(checkpoint.load(digits_run / "best.pt") | {"config": config}, run / "last.pt")
    assert_refused(robust_app("export", "run", "--images", "1"), "--network", "expected last")
    options = ("--images", "1", "--network", "last", "--epsilon", "8/255")
    status, out, _ = robust_app("export", "run", *options)
    assert status == 0
    assert "at ε = 0.03137" in out
