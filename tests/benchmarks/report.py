"""What was measured, as a table in the terminal, as JSON and as Markdown."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.benchmarks.timing import Summary, summary

COLUMNS = ("section", "case", "figure", "value", "quartiles", "aim", "medians")
NAME = "speed"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        section: name of the section that measured it.
        case: the problem.
        figure: what was divided by what.
        value: median with quartiles.
        aim: what was promised; empty where nothing was.
        percent: whether the value is a share, not a ratio.
        seconds: median time of a call of each side, by name.
        gradients: largest memory of each side, in units of one gradient, by name.
    """

    section: str
    case: str
    figure: str
    value: Summary
    aim: str = ""
    percent: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of :data:`COLUMNS`.

        >>> Row("a", "b", "c", Summary(1.0, 0.9, 1.2), seconds={"d": 0.5}).cells()
        ('a', 'b', 'c', '1.000', '0.9000 to 1.200', '', 'd 500 ms')
        """
        value, low, high = (self._number(number) for number in self.value)
        spread = f"{low} to {high}" if self.value.low < self.value.high else ""
        times = [f"{name} {duration(seconds)}" for name, seconds in self.seconds.items()]
        return (self.section, self.case, self.figure, value, spread, self.aim, ", ".join(times))

    def _number(self, value: float) -> str:
        return f"{100 * value:.2f} %" if self.percent else f"{value:#.4g}"


def medians(seconds: Mapping[str, Sequence[float]], *names: str) -> dict[str, float]:
    """The median of each side, or of those named."""
    return {name: summary(seconds[name]).median for name in names or seconds}


def duration(seconds: float) -> str:
    """Three digits with a unit.

    >>> duration(0.0123)
    '12.3 ms'
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


@dataclass
class Report:
    """The rows of each section, with what they were measured on.

    A section that is measured anew replaces its own rows only.

    Attributes:
        sections: by name, ``environment`` and ``rows``.
    """

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, environment: Mapping[str, Any], row: Row) -> None:
        """Note a row of the section under way."""
        self.sections[row.section]["environment"] = dict(environment)
        self.sections[row.section]["rows"].append(row)

    def begin(self, section: str, order: Iterable[str]) -> None:
        """Forget what an earlier run measured in a section; bring the sections into an order."""
        self.sections[section] = {"environment": {}, "rows": []}
        self.sections = {name: self.sections[name] for name in order if name in self.sections}

    def rows(self) -> list[Row]:
        """Of all sections."""
        return [row for section in self.sections.values() for row in section["rows"]]

    def save(self, folder: Path) -> None:
        """Write ``speed.json`` and ``speed.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            name: section | {"rows": [dataclasses.asdict(row) for row in section["rows"]]}
            for name, section in self.sections.items()
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
        (folder / f"{NAME}.md").write_text(markdown(self), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Report":
        """What an earlier run saved; empty where none did."""
        file = folder / f"{NAME}.json"
        if not file.exists():
            return cls()
        content = json.loads(file.read_text(encoding="utf-8"))
        for section in content.values():
            section["rows"] = [
                Row(**(row | {"value": Summary(*row["value"])})) for row in section["rows"]
            ]
        return cls(content)


def table(rows: Sequence[Row]) -> Table:
    """For a terminal, which is too narrow for the medians."""
    made = Table(*COLUMNS[:-1], title="speed")
    for row in rows:
        made.add_row(*row.cells()[:-1])
    return made


def markdown(report: Report) -> str:
    """A page with one table of all rows, one of memory, and their circumstances."""
    rows = report.rows()
    lines = [
        "# Speed",
        "",
        "Measured by `make bench`, which writes this page. The sides of a comparison take turns in "
        "one process and are timed by `torch.utils.benchmark`; a value is the median of the ratios "
        "of neighbouring turns, with their quartiles. Times are of the machine below and mean "
        "nothing elsewhere. What is compared with what, and why: [speed](../speed.md).",
        "",
        *_grid(COLUMNS, [row.cells() for row in rows]),
    ]
    measured = [row for row in rows if row.gradients]
    if measured:
        lines += [
            "",
            "Largest memory of two first steps beyond the parameters, in gradients; cases that "
            "would need more than the free memory are left out:",
            "",
        ]
        names = list(dict.fromkeys(name for row in measured for name in row.gradients))
        body = [
            (row.section, row.case, *(f"{row.gradients.get(name, math.nan):.2f}" for name in names))
            for row in measured
        ]
        lines += _grid(("section", "case", *names), body)
    if any(row.section == "aggregation" for row in rows):
        lines += ["", "![time and memory of a step over the parameters](speed.svg)"]
    for environment, names in _environments(report):
        facts = "; ".join(f"{name} {value}" for name, value in environment.items())
        lines += ["", f"Measured on ({', '.join(names)}): {facts}."]
    return "\n".join(lines) + "\n"


def _grid(columns: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---"] * len(columns)
    return [f"| {' | '.join(cells)} |" for cells in (columns, ruler, *body)]


def _environments(report: Report) -> list[tuple[dict[str, Any], list[str]]]:
    """The different ones, each with the sections measured there."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for name, section in report.sections.items():
        for environment, names in found:
            if environment == section["environment"]:
                names.append(name)
                break
        else:
            found.append((section["environment"], [name]))
    return found
