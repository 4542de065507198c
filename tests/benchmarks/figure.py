"""The curve of time and memory over the number of parameters."""

import re
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.report import NAME, Row


def draw(rows: Sequence[Row], folder: Path) -> None:
    """A column for each K, time above, memory below, as PNG and SVG.

    Args:
        rows: of the section ``aggregation``.
        folder: must exist.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points: dict[int, list[tuple[int, Row]]] = {}
    for row in rows:
        entries, count = place(row.case)
        points.setdefault(count, []).append((entries, row))
    with pyplot.rc_context({"svg.hashsalt": NAME, "font.size": 9}):
        figure, panels = pyplot.subplots(
            2,
            len(points),
            figsize=(2.8 * len(points) + 1, 5),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for (times, memories), (count, found) in zip(panels.T, sorted(points.items()), strict=True):
            x = [entries for entries, _ in found]
            for name in found[0][1].seconds:
                times.loglog(x, [row.seconds[name] for _, row in found], ".-", label=name)
                memories.semilogx(x, [row.gradients[name] for _, row in found], ".-")
            times.set_title(f"K = {count} losses")
            memories.set_xlabel("parameters P")
        panels[0, 0].set_ylabel("seconds a step")
        panels[1, 0].set_ylim(bottom=0)  # last: it would keep later, higher points out
        panels[1, 0].set_ylabel("peak memory, gradients")
        lines, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(folder / f"{NAME}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{NAME}.png", dpi=120)
        pyplot.close(figure)


def place(case: str) -> tuple[int, int]:
    """P and K of a case.

    >>> place("P = 10,000, K = 2")
    (10000, 2)
    """
    entries, count = re.findall(r"= ([\d,]+?)(?:, |$)", case)
    return int(entries.replace(",", "")), int(count)
