"""The command ``robust-app reproduce``."""

from pathlib import Path
from typing import Annotated

import typer

from robust_app import distributed, reporting
from robust_app.options import DataRoot, Device, Download
from robust_app.reproduction import paper, plan
from robust_app.reproduction.reproduce import Reproduction

LIST, ROWS = "NAME[,NAME…]", "Rows of these alone; so also --epsilons and --methods."


def reproduce(
    table: Annotated[str, typer.Argument(help=f"One of {', '.join(paper.names())}.")],
    model_names: Annotated[str, typer.Option("--models", metavar=LIST, help=ROWS)] = "",
    epsilons: Annotated[str, typer.Option(metavar=LIST, help="Of these, 8/255 or 8-255.")] = "",
    method_names: Annotated[str, typer.Option("--methods", metavar=LIST, help="Of these.")] = "",
    schedule: Annotated[
        str, typer.Option(help="Of the recipes: paper, authors or short.")
    ] = "paper",
    epochs_scale: Annotated[
        float, typer.Option(help="Factor on the length of each run's whole schedule.")
    ] = 1.0,
    seeds: Annotated[
        str, typer.Option(metavar=LIST, help="A run each; by default the recipe's own.")
    ] = "",
    stages: Annotated[
        int | None,
        typer.Option(min=1, help="Layer-wise stages after each run; in figure-a all by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where runs, tables and figures are kept.")] = Path(
        "runs/reproduce"
    ),
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
) -> None:
    """Train and evaluate what a table of the paper needs; set its figures beside those measured.

    What is done already is not done again; what is half done is resumed.
    """
    whole = paper.find(table)
    asked = paper.select(whole, *map(_listed, (model_names, epsilons, method_names)))
    settings = plan.Settings(schedule, epochs_scale, plan.parse_seeds(_listed(seeds)), stages)
    console = reporting.console()
    with distributed.join(device) as world:
        reproduction = Reproduction(
            whole, asked, settings, out, world, console, data_root, download
        )
        try:
            reproduction.run()
        except KeyboardInterrupt:
            if world.leads:
                reporting.say(console, "interrupted; the same command continues")
            raise typer.Exit(130) from None


def _listed(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
