"""The paper's figures, drawn from what was measured."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from robust_app import pictures
from robust_app.reproduction.comparison import Measured, paired, reduction, stage_errors
from robust_app.reproduction.paper import Table, shown

ACROSS = 4  # panels in a row
Panels = Mapping[str, Callable[[Axes], None]]


def draw(table: Table, measured: Measured, out: Path) -> list[Path]:
    """Draw a figure of the paper into ``out``, as a PNG and an SVG file.

    Args:
        table: with the rows to show.
        measured: of each row, one a seed.
        out: an existing folder.

    Returns:
        The files; none where the paper has a table, or nothing is measured yet.
    """
    panels: Panels = {}
    if "reduction" in table.extras:
        panels = bar_panels(table, measured)
    elif "stages" in table.networks:
        panels = stage_panels(table, measured)
    if not panels:
        return []
    figure, all_axes = pictures.panels(len(panels), ACROSS, (4, 3.6))
    for axes, (title, paint) in zip(all_axes, panels.items(), strict=True):
        paint(axes)
        axes.set_title(title)
        axes.set_ylabel("verified error, %")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize="small")
    files = [out / f"{table.name}.{kind}" for kind in pictures.FORMATS]
    pictures.save(figure, files)
    return files


def bar_panels(table: Table, measured: Measured) -> Panels:
    """A panel for each ε: the verified errors of both methods, best epoch, model by model."""
    pairs = paired(table.rows, measured, "best", "advibp", "weighted-sum")
    by_radius: dict[str, dict[str, tuple[float, float]]] = {}
    for (_, epsilon, model), errors in pairs.items():
        by_radius.setdefault(f"ε = {shown(epsilon)}", {})[model] = errors
    return {title: _bars(errors) for title, errors in by_radius.items()}


def stage_panels(table: Table, measured: Measured) -> Panels:
    """A panel for each data set and ε: the verified error over the stages, a line a model."""
    by_radius: dict[str, dict[str, Sequence[float]]] = {}
    for row in table.rows:
        if errors := stage_errors(measured.get(row, ())):
            title = f"{row.dataset}, ε = {shown(row.epsilon)}"
            by_radius.setdefault(title, {})[row.model] = errors
    return {title: _lines(errors) for title, errors in by_radius.items()}


def _bars(errors: Mapping[str, tuple[float, float]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        places = range(len(errors))
        ours, theirs = zip(*errors.values(), strict=True)
        axes.bar([place - 0.2 for place in places], theirs, 0.4, label="weighted sum")
        texts = [f"{-reduction(*pair):+.1f}%" for pair in errors.values()]
        bars = axes.bar([place + 0.2 for place in places], ours, 0.4, label="AdvIBP")
        axes.bar_label(bars, texts, fontsize="x-small")
        axes.margins(y=0.35)  # for the legend
        axes.set_xticks(places, list(errors))

    return paint


def _lines(errors: Mapping[str, Sequence[float]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for model, values in errors.items():
            axes.plot(range(len(values)), values, marker="o", label=model)
        axes.set_xticks(range(max(map(len, errors.values()))))
        axes.set_xlabel("layer-wise stage")

    return paint
