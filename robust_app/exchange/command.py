"""The command ``robust-app export``."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from robust_app import examination, loading, reporting, verifiers
from robust_app.data import Dataset
from robust_app.errors import UserError, shown, unknown
from robust_app.examination import Examination
from robust_app.exchange.export import export as write
from robust_app.options import DataRoot, Download, Epsilon, VerifierNames
from robust_app.run_directory import RunDirectory

NETWORKS = ("best", "last")


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")],
    network: Annotated[str, typer.Option(help="best or last.")] = "best",
    out: Annotated[
        Path | None, typer.Option(help="A folder to make; RUN_DIR/export by default.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="As many test images as evaluate would draw; 10.")
    ] = None,
    indices: Annotated[
        str | None, typer.Option(metavar="I[,I…]", help="These test images, counted from 0.")
    ] = None,
    epsilon: Epsilon = None,
    verifier: VerifierNames = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds for a property, of others and of exact.")
    ] = 60.0,
    data_root: DataRoot = None,
    download: Download = False,
) -> None:
    """Write a run's network as ONNX, and the robustness of test images as VNN-LIB properties."""
    if network not in NETWORKS:
        raise unknown("--network", network, NETWORKS)
    directory = RunDirectory(run_dir)
    config = directory.config()
    if network == "best" and config.held_out == 0:
        raise UserError("--network: expected last, for nothing was held out to choose the best by")
    if not 0 < time_limit < math.inf:
        raise UserError(f"--time-limit: expected a positive, finite number, found {time_limit}")
    how = dataclasses.replace(Examination.of(config), time_limit=time_limit)
    if epsilon is not None:
        how = dataclasses.replace(how, epsilon=epsilon)
    if verifier is not None:
        how = dataclasses.replace(how, verifiers=verifiers.parse(verifier))
    dataset = loading.load_data(directory, config, data_root, download, "cpu")
    chosen = _chosen(dataset, images, indices, config.seed)
    loaded, epoch = loading.load_network(directory, dataset, network)
    folder = out or run_dir / "export"
    console = reporting.console()
    with reporting.evaluating(console, "properties", len(chosen)) as on_image:
        parity, verdicts = write(loaded, dataset, chosen, how, config.seed, folder, on_image)
    found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    reporting.say(
        console,
        f"{network} network (epoch {epoch}): logits by ONNX Runtime and by torch differ by up to "
        f"{parity.difference:.2g}; rounding explains {parity.tolerance:.2g}\n"
        f"{len(chosen)} properties at ε = {how.epsilon:.4g}: {found} "
        f"by PGD and {', '.join(how.verifiers)}\n"
        f"written to {folder}",
    )


def _chosen(dataset: Dataset, count: int | None, text: str | None, seed: int) -> list[int]:
    """Indices of test images."""
    if text is None:
        return examination.drawn(dataset, 10 if count is None else count, seed).tolist()
    if count is not None:
        raise UserError("--indices: give these or --images, not both")
    last = len(dataset.x_test) - 1
    for part in text.split(","):
        digits = part.strip()
        if not digits.isdecimal() or len(digits) > 18 or int(digits) > last:
            found = shown(part)
            raise UserError(f"--indices: expected integers from 0 to {last}, found {found}")
    return list(dict.fromkeys(map(int, text.split(","))))
