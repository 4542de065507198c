"""Recipes: a :class:`~robust_app.config.Config` by name.

A file of this folder is a *family* of recipes: a table ``default`` names a choice for each of
``model``, ``epsilon``, ``method`` and ``schedule``, a table per kind says what a choice changes,
and a recipe's name strings choices together. ``mnist-dm-small-0.3-advibp-paper`` is the family
``mnist`` with four choices made; those that are left out are the default's. A file of the user's
is one recipe, with a key per field of the Config and, if they like, a ``description``.
"""

import itertools
import os
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from robust_app import documents
from robust_app.config import Config
from robust_app.errors import UserError, unknown

KINDS = ("model", "epsilon", "method", "schedule")


class Family(NamedTuple):
    """Recipes that share a file.

    Attributes:
        name: what their names begin with.
        description: one line for the user.
        table: the file.
    """

    name: str
    description: str
    table: Mapping[str, Any]

    def choices(self, kind: str) -> list[str]:
        """What a name may say of one of the :data:`KINDS`."""
        if kind == "model":
            return list(self.table["models"])
        return list(dict.fromkeys(choice for key in self.table[kind] for choice in key.split()))

    def shown(self, choice: str) -> str:
        """A choice as a listing has it: a schedule with the methods that it is for, if not all."""
        methods = self.table["schedule"].get(choice, {}).get("methods")
        return choice if methods is None else f"{choice} (with {', '.join(methods)})"

    def default(self, kind: str) -> str:
        """What a name that says nothing of it means."""
        choice: str = self.table["default"][kind]
        return choice

    def recipe(self, choice: Mapping[str, str]) -> Config:
        """The recipe of a choice for each of the :data:`KINDS`."""
        values = _merged(self.table["base"], choice)
        for kind in ("schedule", "epsilon", "method"):
            values |= _merged({kind: self.table[kind]}, choice)
        return Config.from_mapping(values | {"model": choice["model"], "method": choice["method"]})


def load(name_or_path: str | Path) -> Config:
    """The Config of a recipe of the package, or of a file where the argument ends in ``.toml``.

    Raises:
        UserError: there is no such recipe or file, it is not TOML, or a value is refused.

    >>> load("mnist-dm-large-0.1").evaluation_epsilon
    0.1
    >>> load("mnist-dm-small-0.3-advibp-paper") == load("mnist-dm-small")
    True
    """
    name = str(name_or_path)
    if name in _composed():
        family, choice = _composed()[name]
        return family.recipe(choice)
    values = _read(name)
    values.pop("description", None)
    try:
        return Config.from_mapping(values)
    except UserError as error:
        raise UserError(f"recipe {name}: {error}") from None


def description(name_or_path: str | Path) -> str:
    """What a recipe says of itself in a line; empty where it says nothing.

    Raises:
        UserError: there is no such recipe or file, or it is not TOML.
    """
    name = str(name_or_path)
    if name in _composed():
        family, choice = _composed()[name]
        said = [choice[kind] for kind in KINDS]
        return f"{family.description}: {said[0]}, ε = {said[1]}, {said[2]}, schedule {said[3]}"
    return str(_read(name).get("description", ""))


def names() -> list[str]:
    """Every recipe of the package, by its full name."""
    return sorted(
        {
            "-".join((family.name, *(choice[kind] for kind in KINDS)))
            for family, choice in _composed().values()
        }
    )


@cache
def families() -> tuple[Family, ...]:
    """The families of the package."""
    files = sorted(resources.files("robust_app.recipes").iterdir(), key=lambda file: file.name)
    found = []
    for file in files:
        stem, _, ending = file.name.rpartition(".")
        if ending == "toml":
            table = tomllib.loads(file.read_text(encoding="utf-8"))
            found.append(Family(stem, table["description"], table))
    return tuple(found)


def _merged(table: Mapping[str, Any], choice: Mapping[str, str]) -> dict[str, Any]:
    """A table's plain values, overridden by those of its subtables that the choice names.

    A subtable's key names one choice, or several with spaces between them.
    """
    values = {
        key: value
        for key, value in table.items()
        if not isinstance(value, Mapping) and key != "methods"  # says where a schedule applies
    }
    for kind in KINDS:
        special = table.get(kind)  # of `epsilon` it may be a plain value, taken above
        if isinstance(special, Mapping):
            for named, changes in special.items():
                if choice[kind] in named.split():
                    values |= _merged(changes, choice)
    return values


@cache
def _composed() -> dict[str, tuple[Family, dict[str, str]]]:
    """Every name of every family, short and full, with what it chooses."""
    found = {}
    for family in families():
        options = [["", *family.choices(kind)] for kind in KINDS]
        for said in itertools.product(*options):
            choice = {
                kind: part or family.default(kind) for kind, part in zip(KINDS, said, strict=True)
            }
            methods = family.table["schedule"][choice["schedule"]].get("methods")
            if methods is None or choice["method"] in methods:
                found["-".join(filter(None, (family.name, *said)))] = (family, choice)
    return found


def _read(name: str) -> dict[str, Any]:
    """The keys of a recipe in a file of the user's."""
    if not name.endswith(".toml"):
        if name and os.path.exists(name):  # noqa: PTH110 (a Path raises where a name is too long)
            raise UserError(f"recipe {name}: a file of a recipe's name ends in .toml")
        if os.path.exists(f"{name}.toml"):  # noqa: PTH110
            raise UserError(f"recipe {name}: unknown; for the file here say {name}.toml")
        raise unknown("recipe", name, _composed())
    try:
        return documents.read_toml(Path(name))
    except OSError as error:
        raise UserError(f"recipe {name}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"recipe {name}: not valid TOML ({error})") from error
