"""The command ``robust-app verify-run``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from robust_app import distributed, environment, loading, reporting, verify_run
from robust_app.errors import UserError
from robust_app.options import DataRoot, Device, Download
from robust_app.run_directory import RunDirectory
from robust_app.verify_run import Claim

NAMES = {
    "standard_error": "standard",
    "pgd_error": "PGD",
    "verified_error": "verified",
    "certified": "certified",
    "falsified": "falsified",
    "undecided": "undecided",
}


def verify(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Of a run, complete or paused.")
    ],
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
) -> None:
    """Repeat a run's measurements and say of each figure whether it is the same.

    Status 0 if all are, or as near as the time limit of exact lets them be; 1 if not. Changes
    nothing.
    """
    directory = RunDirectory(run_dir)
    config = directory.config()
    with distributed.join(device) as world:
        if not world.leads:
            return
        dataset = loading.load_data(directory, config, data_root, download, world.device)
        kept = verify_run.load_networks(directory, dataset)
        verify_run.check_files(directory, kept)
        networks = dict(kept.values())
        console = reporting.console()
        progress = partial(reporting.evaluating, console)
        claims = [
            *verify_run.of_held_out_images(directory, dataset, networks),
            *verify_run.of_test_images(directory, dataset, networks, progress),
        ]
        here = environment.describe(world.device, 1, config.seed, None)
    if all(claim.found is None for claim in claims):
        raise UserError(f"{run_dir}: nothing to verify, no figure of a saved network is reported")
    console.print(_table(str(run_dir), claims))
    _conclude(console, claims, verify_run.differences(claims, here))
    if not all(claim.holds for claim in claims):
        raise typer.Exit(1)


def _table(title: str, claims: Sequence[Claim]) -> Table:
    columns = ("reported in", "network of epoch", "figure", "reported", "found", "")
    table = reporting.listing(columns, [_row(claim) for claim in claims])
    table.title = escape(title)
    return table


def _row(claim: Claim) -> tuple[str, ...]:
    """A claim's cells.

    >>> _row(Claim("metrics.jsonl", 3, "standard_error", 4.0, 4.25, {}))
    ('metrics.jsonl', '3', 'standard', '4.00%', '4.25%', 'off by +0.25')
    >>> _row(Claim("results.json, 1", 3, "certified", 14, 15, {}, left_open=1))
    ('results.json, 1', '3', 'certified', '14', '15', 'off by +1, left by time')
    """
    unit = "%" if claim.figure.endswith("_error") else ""
    shown = [
        "" if value is None else f"{value:.2f}%" if unit else str(value)
        for value in (claim.reported, claim.found)
    ]
    if claim.found is None:
        verdict = "this network is not kept"
    elif claim.differs:
        verdict = f"off by {claim.found - claim.reported:+.3g}"
        verdict += ", left by time" if claim.holds else ""
    else:
        verdict = "same"
    return (claim.where, str(claim.epoch), NAMES[claim.figure], *shown, verdict)


def _conclude(console: Console, claims: Sequence[Claim], elsewhere: Sequence[str]) -> None:
    compared = [claim for claim in claims if claim.found is not None]
    wrong = sum(not claim.holds for claim in claims)
    lines = [f"{len(compared)} figures compared: {wrong or 'none'} differ{'s' * (wrong == 1)}"]
    if any(claim.differs and claim.holds for claim in claims):
        lines[0] += (
            ", but for what exact left undecided at its time limit, which depends on the machine's "
            "speed"
        )
    if elsewhere:
        lines.append("made in another environment, in which roundings may differ:")
        lines += [f"  {difference}" for difference in elsewhere]
    elif wrong:
        lines.append("the environment is the same: the run's files were changed, or the code")
    for line in lines:
        reporting.say(console, line)
