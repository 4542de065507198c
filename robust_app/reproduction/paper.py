"""What the paper reports, read from ``paper.toml``: its tables as rows to be reproduced."""

import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from robust_app.errors import UserError

QUANTITIES = {
    "standard": "standard",
    "verified": "verified",
    "ibp": "by IBP alone",
    "pgd": "PGD",
}


@dataclass(frozen=True)
class Row:
    """A network and the radius it is evaluated at.

    Args:
        dataset, method, model: as a :class:`~robust_app.config.Config` names them.
        epsilon: as the recipes of the data set name it, ``"0.3"`` or ``"8-255"``.
        verifiers: the cascade that stands in for the paper's verifier.
        images: how many test images are evaluated, drawn at random; None for all.
        figures: what the paper reports of it: some of :data:`QUANTITIES`, in percent.
    """

    dataset: str
    epsilon: str
    method: str
    model: str
    verifiers: tuple[str, ...] = ("ibp",)
    images: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper.

    Args:
        name: as the command line has it, ``"table-4"``.
        title: one line for the reader.
        notes: what to know before comparing, a sentence or two each.
        rows: in the paper's order.
        networks: which of a run's networks are evaluated: ``"best"``, ``"last"``, or
            ``"stages"``, those at the end of each layer-wise stage.
        quantities: the errors reported, keys of :data:`QUANTITIES`.
        extras: what else the paper reports, by name, as ``paper.toml`` describes it.
    """

    name: str
    title: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    networks: tuple[str, ...]
    quantities: tuple[str, ...]
    extras: Mapping[str, Any]


def names() -> list[str]:
    """The tables and figures there are."""
    return list(_parsed())


def find(name: str) -> Table:
    """The table of that name.

    Raises:
        UserError: there is none; lists those there are.

    >>> find("table-4").rows[0].figures
    {'standard': 1.67, 'verified': 3.44, 'pgd': 3.09}
    """
    if name not in _parsed():
        raise UserError(f"unknown table {name!r}; there are {', '.join(names())}")
    values = dict(_parsed()[name])
    how = {
        "verifiers": tuple(values.pop("verifiers", ["ibp"])),
        "images": values.pop("images", None),
    }
    base = {"dataset": values.pop("dataset", ""), **how}
    entries = [*values.pop("rows", []), *_combinations(values.pop("grids", []))]
    lists = {key: tuple(values.pop(key)) for key in ("notes", "networks", "quantities")}
    return Table(
        name=name,
        title=values.pop("title"),
        rows=tuple(_row(base | entry) for entry in entries),
        extras=values,
        **lists,
    )


def select(
    table: Table,
    models: Sequence[str] = (),
    epsilons: Sequence[str] = (),
    methods: Sequence[str] = (),
) -> Table:
    """The table with the rows that were asked for alone.

    Args:
        table: of :func:`find`.
        models: to keep; all of them where empty.
        epsilons: to keep, ``"8/255"`` or ``"8-255"``; all of them where empty.
        methods: to keep; all of them where empty.

    Raises:
        UserError: the table has no such row; lists what it has.

    >>> [row.model for row in select(find("table-4"), epsilons=["0.4"], methods=["advibp"]).rows]
    ['dm-small', 'dm-medium', 'dm-large']
    """
    wanted = {
        "model": models,
        "epsilon": [epsilon.replace("/", "-") for epsilon in epsilons],
        "method": methods,
    }
    rows = table.rows
    for kind, asked in wanted.items():
        known = dict.fromkeys(getattr(row, kind) for row in table.rows)
        for name in asked:
            if name not in known:
                there = ", ".join(shown(name) if kind == "epsilon" else name for name in known)
                raise UserError(f"{table.name} has no {kind} {name!r}; it has {there}")
        rows = tuple(row for row in rows if not asked or getattr(row, kind) in asked)
    if not rows:
        there = "; ".join(
            f"{', '.join(dict.fromkeys(row.model for row in group))} at ε = {shown(epsilon)}"
            for epsilon, group in itertools.groupby(table.rows, lambda row: row.epsilon)
        )
        raise UserError(f"{table.name} has no such row; it has {there}")
    return replace(table, rows=rows)


def shown(epsilon: str) -> str:
    """A radius as the paper writes it.

    >>> shown("8-255")
    '8/255'
    """
    return epsilon.replace("-", "/")


def _combinations(grids: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every row of grids of data set, radii, methods and models."""
    for grid in grids:
        for epsilon, method, model in itertools.product(
            grid["epsilons"], grid["methods"], grid["models"]
        ):
            yield {
                "dataset": grid["dataset"],
                "epsilon": epsilon,
                "method": method,
                "model": model,
            }


def _row(entry: Mapping[str, Any]) -> Row:
    return Row(
        **{key: entry[key] for key in ("dataset", "epsilon", "method", "model")},
        verifiers=tuple(entry["verifiers"]),
        images=entry["images"],
        figures={name: entry[name] for name in QUANTITIES if name in entry},
    )


@cache
def _parsed() -> dict[str, Any]:
    file = resources.files("robust_app.reproduction") / "paper.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
