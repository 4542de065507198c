"""``robust-app evaluate`` of networks from elsewhere; that of runs is in test_evaluate_run.py."""

import json
import os
import sys

import onnx
import pytest
import torch

from robust_app import models
from robust_app.exchange.writing import to_onnx
from tests.robust_app.exchange.models import model, node
from tests.robust_app.refusals import assert_refused

ON_DIGITS = ("--dataset", "digits", "--epsilon", "0.002", "--images", "20", "--pgd-steps", "2")

FACTORY = """
import torch
from torch import Tensor, nn
from robust_app.bounds import propagate
from robust_app.interval import Interval
from robust_app.models import build
from robust_app.rounding import rounding_error

def make():
    return build("digits-cnn", (1, 8, 8), classes=10)

class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2

class Known(Half):
    pass

@propagate.register
def known(layer: Known, interval: Interval) -> Interval:
    return Interval(interval.center / 2, interval.radius / 2)

@rounding_error.register
def nothing(layer: Known, box: Interval) -> None:
    return None

def with_half():
    return nn.Sequential(Half(), make())

def with_known():
    return nn.Sequential(Known(), make())
"""


@pytest.fixture
def here(robust_app, digits_run, tmp_path):
    """Weights of the run as others keep them, its function, and an ONNX file of it."""
    trained = torch.load(digits_run / "best.pt")["network"]
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.items()}}, tmp_path / "w.pt")
    (tmp_path / "networks.py").write_text(FACTORY)
    network = models.build("digits-cnn", (1, 8, 8), classes=10)
    network.load_state_dict(trained)
    onnx.save(to_onnx(network, (1, 8, 8)), tmp_path / "model.onnx")
    return robust_app


def test_the_same_network_in_every_form_has_the_same_errors(here, digits_run, tmp_path):
    python = ("--model", "networks.py:make", "--weights", "w.pt")
    results = []
    for network in (("model.onnx",), python):
        status, out, err = here("evaluate", *network, *ON_DIGITS, "--output", "results.json")
        assert (status, err) == (0, "")
        first, *_ = out.splitlines()
        assert "% of the 360 test images rightly" in first
        assert "near chance" not in out
        assert "20 test images, ε = 0.002" in out
        results.append(json.loads((tmp_path / "results.json").read_text()))
    assert "w.pt" in results[1]["environment"]["command"]
    assert results[0]["data"].startswith("sha256:")
    for result in results:
        del result["environment"]
    names = [result.pop("network") for result in results]
    assert names == ["model.onnx", "networks.py:make"]
    for result in results:
        for share in result["shares"].values():
            del share["seconds"]
    assert results[0] == results[1]
    assert results[0]["certified"] > 0
    assert (results[0]["dataset"], results[0]["images"]) == ("digits", 20)


@pytest.mark.parametrize("name", ["model.onnx", "w.pt", "networks.py", "list.json", "one.json"])
def test_the_results_replace_nothing_but_results(here, tmp_path, name):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "one.json").write_text('{"network": "a", "dataset": "digits", "epsilon": 0.1}')
    before = (tmp_path / name).read_bytes()
    (tmp_path / "link").symlink_to(name)
    for output in (name, "link"):
        outcome = here("evaluate", "model.onnx", *ON_DIGITS, "--output", output)
        assert_refused(outcome, "--output: expected a new file", f"found {output}")
        assert outcome[1] == ""  # before anything is computed
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="pipes are of POSIX")
def test_no_results_are_written_to_a_pipe(here, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # of devices, a test run by root could replace the real one
    outcome = here("evaluate", "model.onnx", *ON_DIGITS, "--output", "pipe")
    assert_refused(outcome, "--output: expected a new file", "found pipe")


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_where_no_results_can_be_written_is_told_before_the_work(here, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "lost").symlink_to("nowhere/o.json")
    for output, words in {
        "circle": ("--output: circle", "cannot be written"),
        "lost": ("--output: lost", f"no folder {tmp_path / 'nowhere'}"),
        "a" * 300: ("--output: aaa", "too long"),
        "b" * 250: ("--output: bbb", "too long"),
        "w.pt/o.json": ("--output: w.pt/o.json", "cannot be written"),
    }.items():
        outcome = here("evaluate", "model.onnx", *ON_DIGITS, "--output", output)
        assert_refused(outcome, *words)
        assert outcome[1] == ""


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_the_results_are_where_a_link_leads_and_the_file_keeps_its_mode(here, tmp_path):
    file, link = tmp_path / "private.json", tmp_path / "link.json"
    file.touch(mode=0o400)
    link.symlink_to(file)
    for _ in range(2):  # an empty file is replaced, and results are
        assert here("evaluate", "model.onnx", *ON_DIGITS, "--output", "link.json")[0] == 0
        assert link.is_symlink()
        assert file.stat().st_mode & 0o777 == 0o400
        assert json.loads(file.read_text())["dataset"] == "digits"


def test_a_network_near_chance_is_warned_of(here):
    _, out, _ = here("evaluate", "--model", "networks.py:make", *ON_DIGITS)
    assert "warning: that is near chance" in out


def test_the_function_may_register_rules(here):
    weights = ("--weights", "w.pt")
    outcome = here("evaluate", "--model", "networks.py:with_half", *ON_DIGITS)
    assert_refused(outcome, "no bounds for the layer Half")
    assert outcome[1] == ""
    assert here("evaluate", "--model", "networks.py:with_known", *ON_DIGITS)[0] == 0
    outcome = here("evaluate", "--model", "networks.py:with_known", *weights, *ON_DIGITS)
    assert_refused(outcome, "missing: 1.0.bias", "not of this network: 0.bias")


def test_names_are_shown_as_they_are_and_layers_may_work_in_place(here, tmp_path):
    (tmp_path / "new[old]").mkdir()
    text = FACTORY + "\ndef in_place():\n    return nn.Sequential(nn.ReLU(inplace=True), make())\n"
    (tmp_path / "new[old]" / "a.py").write_text(text)
    status, out, err = here("evaluate", "--model", "new[old]/a.py:in_place", *ON_DIGITS)
    assert status == 0, err
    assert " new[old]/a.py:in_place " in out


def test_an_operator_without_a_layer_is_named(here, tmp_path):
    nodes = [node("Flatten", "X", output="f"), node("Softmax", "f")]
    onnx.save(model(nodes, (1, 8, 8)), tmp_path / "soft.onnx")
    outcome = here("evaluate", "soft.onnx", *ON_DIGITS)
    assert_refused(outcome, "soft.onnx: node Y, operator Softmax")


def test_images_of_another_shape_are_refused(here, tmp_path):
    onnx.save(model([node("Flatten", "X")], (1, 28, 28)), tmp_path / "mnist.onnx")
    assert_refused(here("evaluate", "mnist.onnx", *ON_DIGITS), "(1, 28, 28)", "(1, 8, 8)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("one of RUN_DIR, FILE.onnx and --model",)),
        (("model.onnx", "--model", "networks.py:make"), ("one of RUN_DIR",)),
        (("model.onnx", "--epsilon", "0.1"), ("--dataset and --epsilon",)),
        (("model.onnx", "--dataset", "digits"), ("--dataset and --epsilon",)),
        (("model.onnx", "--weights", "w.pt", *ON_DIGITS), ("--weights", "FILE.onnx has its own")),
        (("absent.onnx", *ON_DIGITS), ("absent.onnx", "cannot be read as ONNX")),
        (("absent", "--epsilon", "0.1"), ("absent", "no run here")),
        (("networks.py", *ON_DIGITS), ("the folder of a run or a FILE.onnx, found networks.py",)),
        ((".", "--dataset", "digits"), ("--dataset", "a run has its own")),
        (("model.onnx", "--dataset", "digit", "--epsilon", "0.1"), ("'digit'", "'digits'")),
        (("model.onnx", "--dataset", "digits", "--epsilon", "nan"), ("epsilon", "[0, 1]", "nan")),
        (("model.onnx", *ON_DIGITS, "--output", "."), ("--output", "a file", "folder .")),
        (("model.onnx", *ON_DIGITS, "--output", ""), ("--output", "a file", "folder .")),
        (("model.onnx", *ON_DIGITS, "--output", "/"), ("--output", "a file", "folder /")),
        (("a" * 300,), ("aaa", "too long")),
        (("--model", "a" * 300 + ".py:make", *ON_DIGITS), ("aaa", "too long")),
        (("model.onnx", *ON_DIGITS, "--output", "no/o.json"), ("no/o.json", "cannot be written")),
        (("model.onnx", *ON_DIGITS, "--verifier", "ibq"), ("'ibq'", "'ibp'")),
        (("--model", "networks.py:absent", *ON_DIGITS), ("no function absent in networks.py",)),
        (("--model", "absent.py:make", *ON_DIGITS), ("no Python file absent.py",)),
        (("--model", "networks.py:Interval", *ON_DIGITS), ("networks.py:Interval fails",)),
        (("--model", "networks.py:make", "--weights", "no.pt", *ON_DIGITS), ("no.pt",)),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(here, tmp_path, arguments, words):
    before = sorted(tmp_path.iterdir())
    assert_refused(here("evaluate", *arguments), *words)
    assert sorted(file for file in tmp_path.iterdir() if file.name != "__pycache__") == before


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_its_packages_it_says_what_to_install(here, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(here("evaluate", "model.onnx", *ON_DIGITS), "pip install onnx onnxruntime")
