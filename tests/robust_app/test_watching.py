"""Means over an epoch, and watchers told in turn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_app.watching import Means, Watchers
from tests.robust_app.runs import A_MOMENT

numbers = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8)


@given(numbers, numbers)
def test_means_are_over_the_steps_that_report_a_value(always, sometimes):
    means = Means()
    for value in always:
        means.add({"always": torch.tensor(value)})
    for value in sometimes:
        means.add({"sometimes": torch.tensor(value)})
    expected = {
        "always": sum(always) / len(always),
        "sometimes": sum(sometimes) / len(sometimes),
    }
    assert means.read() == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_each_watcher_is_told_everything_in_turn():
    told = []

    class Watcher:
        def __init__(self, name):
            self.name = name

        def batch(self, *what):
            told.append((self.name, *what))

        def epoch(self, metrics):
            told.append((self.name, metrics))

    means, both = Means(), Watchers([Watcher("a"), Watcher("b")])
    both.batch(0, 1, 2, A_MOMENT, means)
    both.epoch({"epoch": 1})
    batch = (0, 1, 2, A_MOMENT, means)
    assert told == [("a", *batch), ("b", *batch), ("a", {"epoch": 1}), ("b", {"epoch": 1})]
