"""A table of the paper, reproduced, as files: Markdown, JSON and pictures."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from robust_app.checkpoint import replacing
from robust_app.errors import UserError
from robust_app.reproduction import figures, sheets
from robust_app.reproduction.comparison import Measured
from robust_app.reproduction.paper import Table
from robust_app.reproduction.plan import Settings
from robust_app.reproduction.sheets import Sheet

NAMES = {"data set", "method", "model", "error", "device", "directory", "recipe"}


def write(
    table: Table,
    settings: Settings,
    measured: Measured,
    remarks: Sequence[str],
    made_with: Mapping[str, Any],
    out: Path,
) -> None:
    """Write ``NAME.md`` and ``NAME.json``, and ``NAME.png`` and ``NAME.svg`` of a figure.

    Args:
        table: with the rows to write.
        settings: of its runs.
        measured: of each row, one a seed.
        remarks: why anything is missing, a line each.
        made_with: what :func:`robust_app.environment.describe` says.
        out: folder; made if it is not there.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    pictures = figures.draw(table, measured, out)
    markdown = as_markdown(table, settings, measured, remarks, made_with)
    markdown += "".join(f"\n![{table.title}]({file.name})\n" for file in pictures[:1])
    content = as_json(table, settings, measured, remarks, made_with)
    texts = {"md": markdown, "json": json.dumps(content, indent=2, ensure_ascii=False) + "\n"}
    for ending, text in texts.items():
        with replacing(out / f"{table.name}.{ending}") as partial:
            partial.write_text(text, encoding="utf-8")


def as_rich(sheet: Sheet) -> RichTable:
    """A sheet for the screen."""
    table = RichTable(title=sheet.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in sheet.columns:
        table.add_column(column, justify=_side(column))
    for line in sheet.lines:
        table.add_row(*line)
    return table


def as_markdown(
    table: Table,
    settings: Settings,
    measured: Measured,
    remarks: Sequence[str],
    made_with: Mapping[str, Any],
) -> str:
    """The whole table, with what is needed to repeat it."""
    packages = ", ".join(f"{name} {version}" for name, version in made_with["packages"].items())
    facts = [
        f"command: `{shlex.join(['robust-app', *made_with['command'][1:]])}`",
        f"commit {made_with['commit'] or 'unknown'}, {packages}, Python {made_with['python']}, "
        f"{made_with['device']}",
        f"schedule `{settings.schedule}`, epochs × {settings.epochs_scale:g}, "
        f"seeds {', '.join(map(str, settings.seeds)) or 'of the recipes'}; "
        "over several seeds, the median and the range",
        "the best epoch is the one with the lowest verified error on held-out training images; "
        "where one run serves several ε, at the largest of them",
        *table.notes,
        *remarks,
    ]
    blocks = [f"# {table.title}", "\n".join(f"- {fact}" for fact in facts)]
    for sheet in [*sheets.sheets(table, measured), sheets.runs_sheet(measured)]:
        blocks += [f"## {sheet.title[0].upper()}{sheet.title[1:]}", _markdown(sheet)]
    return "\n\n".join(blocks) + "\n"


def as_json(
    table: Table,
    settings: Settings,
    measured: Measured,
    remarks: Sequence[str],
    made_with: Mapping[str, Any],
) -> dict[str, Any]:
    """The same, for programs: every row with the paper's figures and each seed's."""
    return {
        "table": table.name,
        "title": table.title,
        "settings": dataclasses.asdict(settings),
        "environment": dict(made_with),
        "notes": [*table.notes, *remarks],
        "paper": dict(table.extras),
        "rows": [
            dataclasses.asdict(row)
            | {"measured": [dataclasses.asdict(m) for m in measured.get(row, ())]}
            for row in table.rows
        ],
    }


def _markdown(sheet: Sheet) -> str:
    rules = ["---:" if _side(column) == "right" else "---" for column in sheet.columns]
    lines = [sheet.columns, rules, *sheet.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _side(column: str) -> Literal["left", "right"]:
    """Names stand left, numbers right."""
    return "left" if column in NAMES else "right"
