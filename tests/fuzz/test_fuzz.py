"""Some damaged files of each format, and that the harness notices what it is there for."""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from robust_app.errors import UserError
from tests.fuzz import running, worker
from tests.fuzz.__main__ import RESULTS, main
from tests.fuzz.catalogue import FORMATS
from tests.fuzz.formats import Format
from tests.fuzz.mutation import CANARY, PAYLOAD, Random, mutate_bytes, mutate_value

COUNTS = {"checkpoint": 30, "network": 30, "config": 40, "recipe": 40}


@pytest.fixture(scope="module", params=FORMATS)
def form(request):
    return request.param, FORMATS[request.param]()


def test_damaged_files_are_refused_in_a_line_or_valid_still(form):
    name, made = form
    tally = running.run(made, name, 1, range(COUNTS.get(name, 60)))
    assert tally.failed == {}
    assert tally.loaded + tally.refused.total() == tally.files
    assert tally.files + tally.unmade == COUNTS.get(name, 60)
    assert tally.refused


def test_a_number_is_the_same_files_each_time(form, tmp_path):
    name, made = form
    contents = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        for number in range(3):
            here = folder / str(number)
            here.mkdir()
            made.write(Random(f"0 {name} {number}"), here)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents.append([file.read_bytes() for file in files])
    if name not in ("checkpoint", "network", "weights", "npz"):  # zip archives have a date
        assert contents[0] == contents[1]
    assert len({len(content) for content in contents[0]}) > 1


def outcome(read, numbers=range(1)):
    """What the harness says of a reader."""
    return running.run(Format(lambda random, folder: None, read), "made up", 0, numbers)


def refusing(error, cause=None):
    def read(folder):
        raise error from cause

    return read


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda folder: [][0], "IndexError"),
        (lambda folder: Path(CANARY).touch(), "executed"),
        (lambda folder: warnings.warn("careful", stacklevel=1), "careful"),
        (refusing(UserError("x" * 10_000)), "a line of 10000"),
        (refusing(UserError("a"), MemoryError()), "too much memory"),
        (refusing(UserError("a"), RuntimeError("can't allocate")), "too much memory"),
        (refusing(running.Hang("too long")), "Hang"),
    ],
)
def test_what_is_no_refusal_in_a_line_is_a_failure(read, words):
    tally = outcome(read)
    assert words in tally.failed[0]
    assert (tally.loaded, tally.refused.total()) == (0, 0)


def test_a_hang_ends(monkeypatch):
    monkeypatch.setattr(running, "PATIENCE", 0.05)
    assert "Hang" in outcome(lambda folder: time.sleep(60)).failed[0]
    monkeypatch.setattr(running, "SECONDS", 0.05)
    monkeypatch.setattr(running, "PATIENCE", 300.0)

    def spin(folder):
        while True:
            pass

    assert "Hang" in outcome(spin).failed[0]


def test_memory_beyond_the_bound_is_a_failure_once(monkeypatch):
    peaks = iter([100.0, 100.0, 100.0, 110.0, 110.0, 500.0, 500.0, 500.0])  # before and after each
    monkeypatch.setattr(running, "_peak", lambda: next(peaks))
    tally = outcome(lambda folder: None, range(4))
    assert list(tally.failed) == [2]
    assert tally.growth == 390


def test_who_refused_first_is_told():
    def read(folder):
        try:
            refuse()
        except UserError as error:
            raise UserError("file: inner") from error

    def refuse():
        raise UserError("inner")

    assert outcome(read).refused == {"test_fuzz.refuse": 1}


def test_the_payload_executes_where_pickles_are_loaded(tmp_path):
    content = b"\x80\2" + PAYLOAD + b"."
    program = f"import pickle; pickle.loads({content!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / CANARY).exists()


def test_a_process_that_dies_fails_at_its_number_and_the_others_are_tried(monkeypatch):
    """The worker in this test dies of its fourth file."""
    program = (
        "import os, sys; from tests.fuzz import worker, running; from tests.fuzz.formats import "
        "Format; worker.FORMATS = {'dying': lambda: Format(lambda r, f: None, lambda f: "
        "os._exit(7) if f.name == '3' else None)}; worker.main(sys.argv[1], "
        "*map(int, sys.argv[2:]))"
    )
    monkeypatch.setattr(running, "WORKER", [sys.executable, "-c", program])
    tally = running.run_apart("dying", 0, range(6))
    assert list(tally.failed) == [3]
    assert "status 7" in tally.failed[3]
    assert (tally.files, tally.loaded) == (6, 5)


def test_the_command_saves_what_became_of_the_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["environment", "--count", "5", "--seed", "3", "--output", str(tmp_path)]) == 0
    [found] = json.loads((tmp_path / "reliability-files.json").read_text()).items()
    name, figures = found
    assert name == "environment"
    assert figures["loaded"] + figures["refused"] == figures["files"]
    assert figures["files"] + figures["could not be made"] == 5
    assert figures["facts"]["seed"] == 3
    assert "environment" in capsys.readouterr().out
    kept = (RESULTS / "reliability-files.json").read_bytes()
    assert main(["environment", "--count", "2", "--seed", "3"]) == 0  # a part: not over the whole
    assert (RESULTS / "reliability-files.json").read_bytes() == kept
    assert "written to" in capsys.readouterr().out
    main(["environment", "--seed", "3", "--number", "2"])
    assert "re" in capsys.readouterr().out


def test_mutations_change_most_values_and_not_the_original():
    value, random = {"a": [1, 2, {"b": 3.0}], "c": "d"}, Random(0)
    before = copy.deepcopy(value)
    changed = [mutate_value(value, random) != before for _ in range(200)]
    assert value == before
    assert sum(changed) > 150
    assert sum(mutate_bytes(b"some bytes" * 9, random) != b"some bytes" * 9 for _ in range(99)) > 90


def test_addresses_are_bounded():
    program = "from tests.fuzz.running import limit_addresses as l; l(); bytearray(2 * 1024**3)"
    asked = subprocess.run(
        [sys.executable, "-c", program],
        cwd=running.ROOT,
        env=os.environ | {"PYTHONPATH": str(running.ROOT)},
        capture_output=True,
        text=True,
    )
    assert "MemoryError" in asked.stderr
    assert worker.FORMATS is FORMATS
