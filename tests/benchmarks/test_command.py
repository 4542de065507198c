"""The command measures, saves and draws; examples in the benchmarks' docstrings hold."""

import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import execution, figure
from tests.benchmarks.__main__ import main
from tests.benchmarks.report import Row
from tests.benchmarks.timing import Summary

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = [
    file.stem for file in sorted(HERE.glob("*.py")) if not file.stem.startswith(("test_", "__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_hold(name):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_curve_is_drawn_the_same_each_time(tmp_path):
    rows = [
        Row(
            "aggregation",
            f"P = {entries:,}, K = {count}",
            "mogd ÷ weighted sum",
            Summary(1.0, 1.0, 1.0),
            seconds={"mogd": entries * 1e-9, "weighted sum": entries * 1e-9},
            gradients={"mogd": 4.0, "weighted sum": 1.0},
        )
        for entries in (10_000, 1_000_000)
        for count in (2, 4)
    ]
    figure.draw(rows, tmp_path)
    first = (tmp_path / "speed.svg").read_bytes()
    figure.draw(rows, tmp_path)
    assert (tmp_path / "speed.svg").read_bytes() == first
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert figure.place("P = 1,000,000, K = 4") == (1_000_000, 4)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_quick_figures_do_not_replace_the_real_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--quick"])
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cuda"], "--output"),
        (
            ["--only", "execution", "--output", "elsewhere"],
            "--only: --device cpu has the sections joint",
        ),
    ],
)
def test_figures_of_a_gpu_do_not_replace_those_of_a_processor(capsys, arguments, told):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("method", ["advibp", "weighted-sum"])
def test_what_is_timed_on_a_gpu_trains_on_both_losses(method):
    step = execution.step_of("table-f-a", method, "eager", "float32", 16, torch.device("cpu"))
    first, *_, last = (step() for _ in range(30))
    for loss in ("adversarial_loss", "certified_loss"):
        assert last[loss] < first[loss]


@pytest.mark.slow
def test_every_section_measures_something(tmp_path):
    pytest.importorskip("torchjd")
    pytest.importorskip("quadprog")
    done = command("--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    sections = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert list(sections) == [
        *("joint step", "TorchJD", "roofline", "bounds"),
        *("memory", "epoch", "aggregation", "processes"),
    ]
    for section in sections.values():
        assert section["rows"]
        assert section["environment"]["seed"] == 0
    assert (tmp_path / "speed.svg").exists()
    command("--quick", "--output", tmp_path, "--only", "memory")
    again = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert again["bounds"] == sections["bounds"]
    assert again["memory"]["environment"] != sections["memory"]["environment"]  # the command
