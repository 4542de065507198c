"""The harness finds a mutant that no test catches, and says which test caught the others."""

import importlib
import json
import subprocess
import sys

import pytest

from tests.soak.harmless import HARMLESS
from tests.soak.mutants import mutants
from tests.soak.mutations import ROOT, Outcome, Unnoticed, check, every_mutant, identity

MODULE = '''
"""Ends of a box, of which the tests look at one."""

def ends(center, radius):
    """Lower and upper."""
    return center - radius, center + radius

def never(x: int | None) -> int:
    if x is None:
        raise ValueError("a" + "b")
    return x

registered = [ends]
'''
TESTS = """
import planted

def test_of_the_lower_end():
    assert planted.registered[0](3, 1)[0] == 2

def test_of_nothing():
    assert planted.never(1) == 1
"""
TRY = """
import importlib, json, sys
from rich.console import Console
from tests.soak import mutations

candidates = list(mutations.mutants(importlib.import_module("planted"), bool))
outcomes = mutations.tried(candidates, 10.0, Console(stderr=True), [sys.argv[1]])
print(json.dumps({o.mutant.change: o.by.rpartition("::")[2] for o in outcomes}))
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(MODULE)
    (tmp_path / "test_planted.py").write_text(TESTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("planted")
    del sys.modules["planted"]


def test_a_planted_survivor_is_found_and_the_others_are_caught(planted, tmp_path):
    command = [sys.executable, "-c", TRY, str(tmp_path / "test_planted.py")]
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    by = json.loads(ended.stdout.splitlines()[-1])
    assert by == {
        "center - radius → center + radius": "test_of_the_lower_end",
        "center - radius → center": "test_of_the_lower_end",
        "center + radius → center - radius": "",
        "center + radius → center": "",
        "center + radius → radius": "",
        "x is None → x is not None": "test_of_nothing",
    }


def test_survivors_must_be_known_to_be_harmless(planted, monkeypatch):
    first, second, *_ = mutants(planted, bool)
    caught, survived = Outcome(first, "a test", 0.1), Outcome(second, "", 0.1)
    with pytest.raises(Unnoticed, match=r"1 that no test catches:\nplanted . ends . center - r"):
        check([caught, survived])
    monkeypatch.setitem(HARMLESS, identity(second), "of no matter")
    check([caught, survived])
    monkeypatch.setitem(HARMLESS, identity(first), "of no matter either")
    with pytest.raises(Unnoticed, match=r"listed as harmless, and caught:\nplanted .* by a test"):
        check([caught, survived])


def test_what_is_listed_as_harmless_is_still_in_the_code():
    assert not set(HARMLESS) - {identity(mutant) for mutant in every_mutant()}
