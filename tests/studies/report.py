"""Rows of a study as JSON, as a table, and as a picture of its fronts."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_app.checkpoint import replacing

Row = dict[str, Any]


def save(name: str, facts: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> None:
    """Write ``NAME.json`` and ``NAME.svg``."""
    with replacing(folder / f"{name}.json") as partial:
        text = json.dumps({"facts": facts, "rows": rows}, indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
    draw(name, rows, folder)


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of all seeds of each variation, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return found


def errors(row: Row) -> dict[str, float]:
    """Every error of a row by what it is.

    >>> errors({"errors": [{"network": "last", "epsilon": 0.3, "standard": 1.5, "verified": 9.0}]})
    {'standard': 1.5, 'verified at 0.3': 9.0}
    """
    found = {}
    for at in row["errors"]:
        found["standard"] = at["standard"]
        if "PGD" in at:
            found[f"PGD at {at['epsilon']:g}"] = at["PGD"]
        found[f"verified at {at['epsilon']:g}"] = at["verified"]
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation, the latter of more than one value.

    >>> spread([1.0, 3.0]), spread([2.0])
    ('2.00 ± 1.41', '2.00')
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(rows: Sequence[Row]) -> str:
    """Means ± standard deviations over the seeds, in Markdown."""
    kinds = list(errors(rows[0]))
    head = ["", "seeds", *kinds, "κ adversarial", "κ certified", "conflicts"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, seeds in by_name(rows).items():
        cells = [spread([errors(row)[kind] for row in seeds]) for kind in kinds]
        for told in ("adversarial_weight", "certified_weight", "conflicts"):
            values = [row["last_epoch"][told] for row in seeds if told in row["last_epoch"]]
            cells.append(f"{statistics.mean(values):.2f}" if values else "–")
        lines.append([name, str(len(seeds)), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(name: str, rows: Sequence[Row], folder: Path) -> None:
    """A panel for each verified error over the standard error, and one over the PGD error.

    A dot is a seed; a line joins the means of a family.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = list(errors(rows[0]))
    verified = [kind for kind in kinds if kind.startswith("verified")]
    planes = [("standard", kind) for kind in verified]
    planes += [(kind, verified[0]) for kind in kinds if kind.startswith("PGD")]
    families = list(dict.fromkeys(row["family"] for row in rows))
    with pyplot.rc_context({"svg.hashsalt": name, "font.size": 9}):
        size = (4.2 * len(planes), 4.6)
        figure, panels = pyplot.subplots(1, len(planes), figsize=size, layout="constrained")
        for axes, (x, y) in zip(panels, planes, strict=True):
            for number, family in enumerate(families):
                groups = by_name([row for row in rows if row["family"] == family])
                means = []
                for seeds in groups.values():
                    points = [(errors(row)[x], errors(row)[y]) for row in seeds]
                    axes.plot(*zip(*points, strict=True), ".", color=f"C{number}", alpha=0.4)
                    means.append([statistics.mean(axis) for axis in zip(*points, strict=True)])
                line = "o-" if len(means) > 1 else "Ds^v"[number // 10]  # there are ten colours
                label = family if axes is panels[0] else None
                axes.plot(*zip(*means, strict=True), line, color=f"C{number}", label=label)
            axes.set_xlabel(f"{x}, error in %")
            axes.set_ylabel(f"{y}, error in %")
            axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
