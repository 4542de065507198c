"""A thousand steps of the soak of the optimizer, and that it would notice what it looks for."""

import json
import mmap

import pytest
import torch
from rich.console import Console

from tests.soak import optimizer
from tests.soak.effort import QUICK
from tests.soak.optimizer import CASES, Training, Unsound, resident, same, soak, use, watch


def test_a_thousand_steps_leave_memory_flat_and_lose_nothing(tmp_path):
    soak(QUICK, Console(quiet=True), tmp_path)
    found = json.loads((tmp_path / "reliability-optimizer.json").read_text(encoding="utf-8"))
    assert found["made with"]["torch"] == torch.__version__
    assert found.keys() - {"made with"} == CASES.keys()
    for name in CASES:
        assert (found[name]["steps"], found[name]["skipped"]) == (250, 0)
        assert found[name]["states saved and loaded"] == 25


def test_a_tensor_that_is_kept_each_step_is_noticed():
    kept = []
    with pytest.raises(Unsound, match="tensors after steps"):
        watch(lambda _: kept.append(torch.zeros(1)), 200)


@pytest.mark.skipif(resident() == 0, reason="the system does not tell")
def test_memory_that_is_not_of_tensors_is_noticed():
    kept = []

    def leak(_: int) -> None:
        page = mmap.mmap(-1, 10_000)  # not of what the process has freed before
        page.write(b"x" * 10_000)
        kept.append(page)

    with pytest.raises(Unsound, match="bytes held after steps"):
        watch(leak, 1000)


@pytest.mark.parametrize("name", CASES)
def test_a_state_that_loses_a_bit_is_noticed(name, monkeypatch):
    def lossy(training):
        again = saved_and_loaded(training)
        with torch.no_grad():
            weight = next(again.model.parameters()).view(-1)
            weight.view(torch.int32)[0] ^= 1
        return again

    saved_and_loaded = Training.saved_and_loaded
    monkeypatch.setattr(optimizer.Training, "saved_and_loaded", lossy)
    with pytest.raises(Unsound, match="step 20: a saved and loaded optimizer has gone another way"):
        use(CASES[name], 40)


def test_sameness_is_of_bits_types_and_names():
    state = Training(CASES["AdamW, 3 losses"]).state()
    assert same(state, Training(CASES["AdamW, 3 losses"]).state())
    assert not same(torch.zeros(1), torch.zeros(1).double())
    assert not same({"a": [1.0]}, {"a": [1.0, 2.0]})
    assert not same({"a": 1}, {"b": 1})
