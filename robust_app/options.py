"""Options of the command line that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

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
