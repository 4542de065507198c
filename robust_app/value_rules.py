"""What a value of a setting may be: said in words, tested and converted."""

import math
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from robust_app.precision import PRECISIONS


class Rule(NamedTuple):
    """What a field may hold: said in words, tested, and converted to the field's type."""

    expectation: str
    admits: Callable[[Any], bool]
    convert: Callable[[Any], object]


def _within(value: object, low: float, high: float) -> bool:
    """Whether value is a number in [low, high]; no bool is one, nor NaN or a huge integer."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and (isinstance(value, float) or abs(value) <= sys.maxsize)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and _within(value, low, high)


def _all_within(low: float, high: float, lengths: Collection[int]) -> Callable[[Any], bool]:
    """Whether a value is a list of so many numbers in [low, high]."""

    def admits(value: Any) -> bool:
        listed = isinstance(value, list | tuple) and len(value) in lengths
        return listed and all(_within(number, low, high) for number in value)

    return admits


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


# The ends of the open ranges: the float next to 0, next to 1, and what float32 can hold.
_TINY, _BELOW_ONE, _HUGE = math.nextafter(0, 1), math.nextafter(1, 0), 3.4e38

TEXT = Rule(
    "a non-empty printable string",
    lambda v: isinstance(v, str) and v != "" and v.isprintable(),
    str,
)
PRECISION = Rule(
    f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}", lambda v: v in PRECISIONS, str
)
SWITCH = Rule("true or false", lambda v: isinstance(v, bool), bool)
POSITIVE_INTEGER = Rule(
    "an integer of at least 1, of 64 bits", lambda v: _whole(v, 1, sys.maxsize), int
)
INTEGER = Rule("an integer of at least 0, of 64 bits", lambda v: _whole(v, 0, sys.maxsize), int)
# More is a slip, of a user or of a file.
ATTEMPTS = Rule("an integer from 1 to 1000000", lambda v: _whole(v, 1, 10**6), int)
NUMBER = Rule("a number", lambda v: _within(v, -math.inf, math.inf), float)
UNIT = Rule("a number in [0, 1]", lambda v: _within(v, 0, 1), float)
FACTOR = Rule("a number in (0, 1]", lambda v: _within(v, _TINY, 1), float)
POSITIVE = Rule("a number above 0, up to 3.4e38", lambda v: _within(v, _TINY, _HUGE), float)
# In the range of floats, also times multipliers and divided by 1 - β₁ of Adam.
RATE = Rule("a number above 0, up to 1e30", lambda v: _within(v, _TINY, 1e30), float)
LATER = Rule("a number of at least 1, or inf", lambda v: _within(v, 1, math.inf), float)
LIMIT = Rule("a number above 0, or inf", lambda v: _within(v, _TINY, math.inf), float)
NONNEGATIVE = Rule("a number from 0 to 3.4e38", lambda v: _within(v, 0, _HUGE), float)
NONNEGATIVES = Rule(
    "a list of at most 1000 numbers from 0 to 3.4e38",  # so that a run's config.toml can be read
    _all_within(0, _HUGE, range(1001)),
    _floats,
)
POSITIVE_PAIR = Rule(
    "two numbers above 0, up to 3.4e38, such as [4, 1]",
    _all_within(_TINY, _HUGE, (2,)),
    _floats,
)
UNIT_PAIR = Rule(
    "two numbers in [0, 1], such as [1, 0]",
    _all_within(0, 1, (2,)),
    _floats,
)
DECAYS = Rule(
    "two numbers in [0, 1), such as [0.9, 0.99]",
    _all_within(0, _BELOW_ONE, (2,)),
    _floats,
)
