"""A run's metrics as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robust_app.checkpoint import replacing

PANELS = (
    ("loss", ("natural_loss", "adversarial_loss", "certified_loss", "mixed_loss")),
    ("weight", ("adversarial_weight", "certified_weight")),
    ("share of steps", ("conflicts", "certified_first")),
    ("held-out error, %", ("standard_error", "verified_error")),
    ("ε", ("epsilon",)),
)


def draw(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw losses, weights, conflicts, errors and ε over the epochs into a PNG file.

    Args:
        metrics: one mapping an epoch, at least one; a value that an epoch lacks leaves a gap.
        path: of the picture.
    """
    figure = Figure(figsize=(8, 11), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [epoch["epoch"] for epoch in metrics]
    for axes, (label, names) in zip(figure.subplots(len(PANELS), sharex=True), PANELS, strict=True):
        for name in names:
            values = [epoch.get(name) for epoch in metrics]
            if any(value is not None for value in values):
                gaps = [float("nan") if value is None else value for value in values]
                axes.plot(epochs, gaps, label=name.replace("_", " "), marker=".", markersize=3)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    axes.set_xlabel("epoch")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
