"""Exported folders; the command's own words are in test_export_command.py."""

import csv
import dataclasses
import re
from pathlib import Path

import onnx
import pytest
import torch

from robust_app import examination, loading
from robust_app.errors import UserError
from robust_app.exact import Verdict
from robust_app.examination import Examination
from robust_app.exchange.export import decided, export
from robust_app.run_directory import RunDirectory
from tests.robust_app.exchange.models import by_runtime

HOW = Examination(0.006, pgd_steps=5, pgd_restarts=1, verifiers=("ibp", "crown"), time_limit=7.5)


@pytest.fixture(scope="session")
def network(digits_run, digits):
    return loading.load_network(RunDirectory(digits_run), digits, "best")[0]


def rows(path):
    return list(csv.reader(path.read_text().splitlines()))


def test_a_folder_holds_the_network_its_properties_and_verdicts(network, digits, tmp_path):
    done = []
    parity, counts = export(network, digits, [3, 0], HOW, 0, tmp_path / "out", done.append)
    assert parity.difference <= parity.tolerance
    assert done == [1, 1]
    properties = ["vnnlib/image-3.vnnlib", "vnnlib/image-0.vnnlib"]
    instances = rows(tmp_path / "out" / "instances.csv")
    assert instances == [["model.onnx", name, "7.5"] for name in properties]
    header, *verdicts = rows(tmp_path / "out" / "verdicts.csv")
    assert header == ["property", "label", "verdict"]
    labels = [str(int(digits.y_test[index])) for index in (3, 0)]
    assert [row[:2] for row in verdicts] == list(map(list, zip(properties, labels, strict=True)))
    assert sum(counts.values()) == 2
    x = digits.x_test[:5] / 255
    logits = by_runtime(onnx.load(tmp_path / "out" / "model.onnx"), x)
    torch.testing.assert_close(logits, network(x), atol=1e-5, rtol=1e-5)
    text = (tmp_path / "out" / properties[0]).read_text()
    lower = [float(value) for value in re.findall(r">= X_\d+ ([\d.]+)", text)]
    expected = (digits.x_test[3].flatten().double() / 255 - 0.006).clamp(0, 1)
    torch.testing.assert_close(torch.tensor(lower).double(), expected, atol=1e-6, rtol=0)


def test_verdicts_are_those_of_the_evaluation(network, digits):
    how = dataclasses.replace(HOW, verifiers=("ibp",))
    counts = dict.fromkeys(Verdict, 0)
    for image, label in zip(digits.x_test[:40], digits.y_test[:40], strict=True):
        counts[decided(network, image, label, how, seed=0)] += 1
    errors = examination.examine(network, digits.x_test[:40], digits.y_test[:40], how, seed=0)
    assert counts[Verdict.CERTIFIED] == errors.certified > 0
    assert counts[Verdict.FALSIFIED] == errors.falsified > 0
    assert counts[Verdict.UNDECIDED] == errors.undecided > 0


@pytest.mark.parametrize("name", ["notes.txt", "model.onnx"])
def test_a_folder_that_is_not_empty_is_left_alone(network, digits, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="not empty; choose another with --out"):
        export(network, digits, [0], HOW, 0, tmp_path, lambda _: None)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def interrupt(images):
    raise KeyboardInterrupt


@pytest.mark.parametrize("made", [True, False])
def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(network, digits, tmp_path, made):
    out = tmp_path / "out"
    if made:
        out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        export(network, digits, [3, 0], HOW, 0, out, interrupt)
    assert list(tmp_path.iterdir()) == []
    export(network, digits, [3, 0], HOW, 0, out, lambda _: None)
    assert len(rows(out / "verdicts.csv")) == 3
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_killed_export_left_is_not_in_the_next(network, digits, tmp_path):
    left = tmp_path / "out.partial" / "vnnlib" / "image-7.vnnlib"
    left.parent.mkdir(parents=True)
    left.write_text("half of")
    export(network, digits, [0], HOW, 0, tmp_path / "out", lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out" / "vnnlib").iterdir()] == ["image-0.vnnlib"]


def test_the_current_folder_is_refused_before_the_work(network, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\.: cannot be written"):
        export(network, digits, [0], HOW, 0, Path(), lambda _: None)


def test_a_folder_that_cannot_be_made_is_refused(network, digits, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        export(network, digits, [0], HOW, 0, tmp_path / "file" / "out", lambda _: None)
