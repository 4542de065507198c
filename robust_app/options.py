"""Options of the command line that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from robust_app.overrides import fraction
from robust_app.verifiers import VERIFIERS

DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of mnist, fashion-mnist and cifar10, as torchvision's.")
]
Download = Annotated[bool, typer.Option("--download", help="Fetch missing data into --data-root.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
VerifierNames = Annotated[
    str | None,
    typer.Option(
        "--verifier",
        metavar="NAME[,NAME…]",
        help=f"Each decides what those before it left: {', '.join(VERIFIERS)}. "
        "By default ibp, and crown-ibp where the training ends with its bounds.",
    ),
]


def number(text: str) -> float:
    """A decimal or, as radii of pixels are often given, a fraction.

    Raises:
        typer.BadParameter: if it is neither.

    >>> number("0.1"), number("8/255") == 8 / 255
    (0.1, True)
    """
    try:
        return fraction(text) if "/" in text else float(text)
    except (ValueError, ArithmeticError):
        raise typer.BadParameter(f"expected a number, 0.1 or 8/255, found {text!r}") from None


Epsilon = Annotated[
    float | None,
    typer.Option(
        parser=number, metavar="NUMBER", help="Radius in pixels of [0, 1]; a run's by default."
    ),
]
