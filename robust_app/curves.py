"""The metrics of runs over their epochs, as a picture."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from robust_app import pictures
from robust_app.metrics import SHOWN, Metrics, epochs_taken_over, values

ACROSS = 3  # panels in a row
FAR_APART = 5  # a factor between numbers that asks for a logarithmic scale

# Of Okabe and Ito, told apart by colour-blind eyes; their yellow is too light for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dashed", "dotted", "dashdot")  # runs that begin alike lie on each other

Line = Mapping[int, float]
"""A metric of a run, by epoch."""


def figure(runs: Mapping[str, Metrics]) -> Figure:
    """A panel for each metric that a run has, with a line for each run.

    Args:
        runs: the metrics of each run by its name in the legend; one at least has a number to show.
    """
    by_metric = {metric: [values(run, metric.key) for run in runs.values()] for metric in SHOWN}
    drawn = {metric: lines for metric, lines in by_metric.items() if any(lines)}
    page, panels = pictures.panels(len(drawn), ACROSS, (4, 2.6))
    last = max(run[-1]["epoch"] for run in runs.values())
    for axes, (metric, lines) in zip(panels, drawn.items(), strict=True):
        handles = [_plot(axes, line, last, place) for place, line in enumerate(lines)]
        if metric.ratios:
            _show_ratios(axes, lines)
        axes.set_title(metric.name, fontsize="medium")
        axes.set_xlim(0, last + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
    page.supxlabel("epoch", fontsize="medium")
    names = [_named(name, run) for name, run in runs.items()]
    columns = 44 * min(len(panels), ACROSS) // (9 + max(map(len, names)))  # by their characters
    page.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=max(1, min(len(runs), columns)),
        fontsize="small",
    )
    return page


def _named(name: str, run: Metrics) -> str:
    """The legend's name of a run; a fork's says where its own epochs begin, if it has any."""
    before = epochs_taken_over(run)
    shown = name.replace("$", r"\$")  # else what is between two of them would be a formula
    return f"{shown} (from epoch {before + 1})" if 0 < before < len(run) else shown


def _plot(axes: Axes, line: Line, last: int, place: int) -> Line2D:
    """A run's line up to the last epoch of all, with gaps; a dot between two of them."""
    color, dashes = COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
    epochs = range(1, last + 1)
    numbers = [line.get(epoch, math.nan) for epoch in epochs]
    [handle] = axes.plot(epochs, numbers, color=color, linestyle=dashes)
    alone = [epoch for epoch in line if not {epoch - 1, epoch + 1} & line.keys()]
    axes.plot(alone, [line[epoch] for epoch in alone], ".", color=color)
    return handle


def _show_ratios(axes: Axes, lines: Sequence[Line]) -> None:
    """A logarithmic scale where runs or epochs differ by large factors.

    Where there are zeros it is linear up to the least of the runs' largest numbers: so each run is
    seen, and one alone is on a linear scale.
    """
    numbers = [number for line in lines for number in line.values()]
    tops = [top for line in lines if (top := max(line.values(), default=0)) > 0]
    zeros = min(numbers) <= 0
    least = min(tops, default=0) if zeros else min(numbers)
    if least == 0 or max(numbers) < FAR_APART * least:
        return
    if zeros:
        axes.set_yscale("symlog", linthresh=least)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
