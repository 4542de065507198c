"""The one exception that the command line turns into a line of text and exit status 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend; the message is one clear line that says what and how."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is in no table; it says which known name is nearest.

    >>> print(unknown("recipe", "digit", ["digits", "mnist-dm-small"]))
    unknown recipe 'digit'; the nearest known is 'digits'
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
    return UserError(f"unknown {kind} {name!r}; the nearest known is {nearest!r}")
