"""The one exception that the command line turns into a line of text and exit status 2."""

import difflib
from collections.abc import Iterable

SHOWN = 200
"""Characters of a value in an error."""
FEW = 4
"""Known names that are listed in an error, and not the nearest alone."""


class UserError(Exception):
    """Something the user can mend; the message is one clear line that says what and how.

    >>> print(UserError("no array named x\\x1b[2J"))  # as a file may name one
    no array named x�[2J
    """

    def __str__(self) -> str:
        return _printable(": ".join(map(str, self.args)))


class SettingError(UserError):
    """A setting of a run that does not fit; the message is its name and what is wrong.

    Attributes:
        setting: its name.

    >>> print(SettingError("epochs", "expected at least 1, found 0"))
    epochs: expected at least 1, found 0
    """

    def __init__(self, setting: str, fault: str) -> None:
        super().__init__(setting, fault)  # both, for what is pickled is made again of them
        self.setting = setting


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is in no table; it says which are, or of many the nearest one.

    Where none is near, it names the command that lists them.

    >>> print(unknown("--execution", "fast", ["eager", "graph", "compile"]))
    unknown --execution 'fast'; known are 'eager', 'graph', 'compile'
    >>> print(unknown("recipe", "digit", ["cifar10", "digits", "mnist", "mnist-dm-small", "svhn"]))
    unknown recipe 'digit'; the nearest known is 'digits'
    >>> print(unknown("recipe", "x", ["cifar10", "digits", "mnist", "mnist-dm-small", "svhn"]))
    unknown recipe 'x'; `robust-app recipes` shows what is known
    """
    known = list(known)
    if len(known) <= FEW:
        return UserError(f"unknown {kind} {shown(name)}; known are {', '.join(map(repr, known))}")
    # To compare a very long name takes very long.
    near = difflib.get_close_matches(name[:SHOWN], known, n=1, cutoff=0.5)
    if near:
        return UserError(f"unknown {kind} {shown(name)}; the nearest known is {near[0]!r}")
    listing = "recipes digits" if kind == "key" else f"{kind}s"
    return UserError(f"unknown {kind} {shown(name)}; `robust-app {listing}` shows what is known")


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error of someone else's says, as part of a line; its kind where it says nothing.

    >>> one_line(ValueError("first,\\n  second")), one_line(MemoryError())
    ('first, second', 'MemoryError')
    """
    words = " ".join(str(error).split())
    return _printable(words[:most]) or type(error).__name__


def reason(error: Exception) -> str:
    """Why somebody else's code failed, as part of a line; of the system's errors without the path.

    >>> reason(OSError(20, "Not a directory", "a/b")), reason(ValueError("odd"))
    ('Not a directory', 'odd')
    """
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or one_line(error)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def shown(value: object) -> str:
    """A value as part of a line, cut where it is long.

    >>> shown("a"), shown([0] * 1000)[-8:]
    ("'a'", '0, 0, 0…')
    """
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
