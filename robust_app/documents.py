"""TOML and JSON from anyone, read within bounds.

What is returned can be shown, compared and written again: it is not nested deeply, and no number
in it is too large for 64 bits.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOML_SIZE, JSON_SIZE = 2**16, 2**26
"""Bytes of a file, at most."""

KEY_PARTS = 100
"""Of a key of TOML, at most: for one of thousands, Python's parser takes minutes."""

_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
# In a string or a comment, what looks like such a key is refused too.
_BEGINS = r"(?m:^|[\[{,])[ \t]*+"
_LONG_KEY = re.compile(rf"{_BEGINS}(?:{_PART}[ \t]*+\.[ \t]*+){{{KEY_PARTS}}}")

_FRACTION = re.compile(r"(?m)^[ \t]*+\w++[ \t]*+=[ \t]*+(\d++[ \t]*+/[ \t]*+\d{1,9})")

DEPTH = 50
"""Of lists and mappings in each other."""


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not TOML, or beyond the bounds.
    """
    return parse_toml(_read(path, TOML_SIZE))


def parse_toml(text: str) -> dict[str, Any]:
    """The keys of a TOML document.

    Raises:
        ValueError: it is not TOML, or beyond the bounds.

    >>> parse_toml("epsilon = 0.1")
    {'epsilon': 0.1}
    """
    if _LONG_KEY.search(text):
        raise ValueError(f"a key of more than {KEY_PARTS} parts")
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        if fraction := _FRACTION.search(text):
            raise ValueError(f"{fraction[1]}: TOML has no fractions, give a number") from error
        raise
    _check(found)
    return found


def read_json(path: Path, lines: bool = False) -> Any:
    """The value of a JSON file, or a list of the values of its lines; all numbers are finite.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or beyond the bounds.
    """
    text = _read(path, JSON_SIZE)
    if lines and not text:
        return []
    try:
        # Only at line feeds: splitlines() would also divide strings that hold other separators.
        parts = text.removesuffix("\n").split("\n") if lines else [text]
        found = [_parse_json(part, line) for line, part in enumerate(parts, 1)]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(found)
    if any(isinstance(value, float) and not math.isfinite(value) for value in _values(found)):
        raise ValueError("a number that is not finite")
    return found if lines else found[0]


def _parse_json(text: str, line: int) -> Any:
    """The value of text that begins in a line of its file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{where}: {error.msg}") from None


def _read(path: Path, most: int) -> str:
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    return content.decode("utf-8")


def _check(document: Any) -> None:
    """Refuse what is nested too deeply, and integers of more than 64 bits."""
    for value in _values(document):
        # Even to show such an integer may fail.
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise ValueError("an integer of more than 64 bits")


def _values(document: Any) -> Iterator[Any]:
    """All that is in a document, itself included, without recursion."""
    level, depth = [document], 0
    while level:
        yield from level
        if depth > DEPTH:
            raise ValueError("nested too deeply")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level, depth = inner, depth + 1
