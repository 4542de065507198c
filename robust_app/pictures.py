"""Panels on a page and the page in files, without a screen."""

import math
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robust_app.checkpoint import replacing

FORMATS = ("png", "svg")
OTHER_FORMATS = ("pdf", "ps", "eps", "jpg", "jpeg", "gif", "tif", "tiff", "webp", "bmp")
"""Whose suffixes mean a picture that is not written here."""


def panels(count: int, across: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of empty panels, row by row.

    Args:
        count: of the panels, at least 1.
        across: how many in a row at most.
        size: width and height of each, in inches.
    """
    columns, rows = min(count, across), math.ceil(count / across)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]


def save(figure: Figure, files: Iterable[Path]) -> None:
    """Write a figure into each file, in the format of its suffix.

    Raises:
        UserError: if a file cannot be written.
    """
    for file in files:
        with replacing(file) as partial:
            figure.savefig(partial, dpi=120, format=file.suffix[1:])
