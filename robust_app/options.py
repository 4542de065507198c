"""Options of the command line that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of mnist, fashion-mnist and cifar10, as torchvision's.")
]
Download = Annotated[bool, typer.Option("--download", help="Fetch missing data into --data-root.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
