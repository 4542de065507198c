"""The command ``robust-app plot``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from robust_app import curves, pictures, reporting
from robust_app.errors import UserError
from robust_app.metrics import SHOWN, Metrics, values
from robust_app.run_directory import RunDirectory


def plot(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR", help="Of runs, complete or in progress.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="NAME", help="Of both pictures, without .png and .svg.")
    ] = Path("curves"),
) -> None:
    """Draw losses, errors, ε, c_t, weights and conflicts over the epochs, a line a run."""
    if out.name in ("", ".."):
        raise UserError(f"--out: expected a name of a picture, found {str(out)!r}")
    kind = out.suffix[1:].lower()
    if kind in pictures.OTHER_FORMATS:
        raise UserError(
            "--out: expected a name without a suffix, or with .png or .svg (both are written), "
            f"found {str(out)!r}"
        )
    paths = [path.resolve() for path in run_dirs]
    runs = {label: read(path) for label, path in zip(labels(paths), paths, strict=True)}
    name = out.with_suffix("") if kind in pictures.FORMATS else out
    files = [name.with_name(f"{name.name}.{kind}") for kind in pictures.FORMATS]
    pictures.save(curves.figure(runs), files)
    for file in files:
        reporting.say(reporting.console(), f"written: {file}")


def read(path: Path) -> Metrics:
    """The metrics of the run in a folder.

    Raises:
        UserError: if there is no run, nothing to show of it yet, or its metrics are damaged.
    """
    directory = RunDirectory(path)
    metrics = directory.metrics()
    if not any(values(metrics, metric.key) for metric in SHOWN):
        directory.config()  # says so where there is no run
        raise UserError(f"{path}: nothing to draw, no epoch is done yet")
    return metrics


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell each from all others.

    Args:
        paths: absolute; one that is there twice has one label.

    >>> labels([Path("/runs/one"), Path("/runs/two"), Path("/old/two")])
    ['one', 'runs/two', 'old/two']
    """
    return [_label(path, [other for other in paths if other != path]) for path in paths]


def _label(path: Path, others: Sequence[Path]) -> str:
    for length in range(1, len(path.parts)):
        end = path.parts[-length:]
        if all(other.parts[-length:] != end for other in others):
            return str(Path(*end))
    return str(path)
