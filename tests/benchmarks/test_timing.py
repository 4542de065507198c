"""Sides take turns, and ratios are of neighbours."""

import pytest

from tests.benchmarks.timing import WARM_UP, in_turns, ratios, summary


def test_every_other_round_goes_backwards():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = in_turns(sides, rounds=3)
    warm_up, turns = calls[: 3 * WARM_UP], calls[3 * WARM_UP :]
    assert warm_up == WARM_UP * ["a", "b", "c"]
    # each turn is one call unmeasured and one measured
    assert "".join(turns[::2]) == "".join(turns[1::2]) == "abccbaabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(time > 0 for times in seconds.values() for time in times)


def test_a_longest_time_averages_many_calls():
    calls = []
    in_turns({"a": lambda: calls.append(0)}, rounds=1, least=1e-3)
    assert len(calls) > 100


def test_what_slows_neighbours_cancels():
    base = [1.0, 5.0, 2.0, 9.0]
    assert ratios([2 * time for time in base], base) == (2.0, 2.0, 2.0)
    assert ratios([2 * time for time in base], base, factor=0.25) == (0.5, 0.5, 0.5)


def test_the_summary_of_one_value_and_of_five():
    assert summary([3.0]) == (3.0, 3.0, 3.0)
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)


def test_sides_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])
