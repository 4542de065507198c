"""The command ``robust-app evaluate``."""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from robust_app import data, distributed, evaluating, loading, reporting, verifiers
from robust_app.errors import UserError
from robust_app.examination import Examination
from robust_app.exchange import outside
from robust_app.options import DataRoot, Device, Download, Epsilon, VerifierNames
from robust_app.run_directory import RunDirectory

OF_OUTSIDE = "Of a network from elsewhere: "


def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN_DIR|FILE.onnx]", help="A run, or a network from elsewhere."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="A network from elsewhere, in Python."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The state_dict of --model, written by torch.save.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help=f"{OF_OUTSIDE}a name from `robust-app datasets`.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A JSON file for the results; of a run, in the place of its own."),
    ] = None,
    epsilon: Epsilon = None,
    verifier: VerifierNames = None,
    pgd_steps: Annotated[
        int | None, typer.Option(min=1, help="A run's by default, else 200.")
    ] = None,
    pgd_restarts: Annotated[
        int | None, typer.Option(min=1, help="A run's by default, else 1.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="As many test images at random, not all.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds for an image, of the verifier exact.")
    ] = 60.0,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
) -> None:
    """Standard, PGD and verified errors on the test images.

    Of a run's best and last network, or of a network from elsewhere.
    """
    if not 0 < time_limit < math.inf:
        raise UserError(f"--time-limit: expected a positive, finite number, found {time_limit}")
    given: dict[str, Any] = {
        "epsilon": epsilon,
        "pgd_steps": pgd_steps,
        "pgd_restarts": pgd_restarts,
        "verifiers": None if verifier is None else verifiers.parse(verifier),
        "time_limit": time_limit,
        "images": images,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if (target is None) == (model is None):
        raise UserError("evaluate: give one of RUN_DIR, FILE.onnx and --model FILE.py:FUNCTION")
    if target is not None and target.suffix != ".onnx" and target.is_file():
        raise UserError(f"evaluate: expected the folder of a run or a FILE.onnx, found {target}")
    with distributed.join(device) as world:
        if not world.leads:
            return
        if target is not None and target.suffix != ".onnx":
            for option, value in (("weights", weights), ("dataset", dataset)):
                if value is not None:
                    raise UserError(f"--{option}: a run has its own; for a FILE.onnx or --model")
            _evaluate_run(RunDirectory(target), changes, data_root, download, world.device, output)
            return
        if dataset is None or epsilon is None:
            raise UserError("evaluate: a network from elsewhere needs --dataset and --epsilon")
        if target is not None and weights is not None:
            raise UserError("--weights: of --model; a FILE.onnx has its own")
        images_of = data.load(dataset, data_root, download)
        network = (
            outside.from_file(target, images_of)
            if target is not None
            else outside.from_function(str(model), weights, images_of)
        )
        evaluating.evaluate_outside(
            str(target or model),
            network.to(world.device),
            images_of.to(world.device),
            reporting.console(),
            Examination(**{"pgd_steps": 200, "pgd_restarts": 1} | changes),
            output,
        )


def _evaluate_run(
    directory: RunDirectory,
    changes: dict[str, Any],
    data_root: Path | None,
    download: bool,
    device: torch.device,
    output: Path | None,
) -> None:
    config = directory.config()
    how = dataclasses.replace(Examination.of(config), **changes)
    dataset = loading.load_data(directory, config, data_root, download, device)
    with directory.locked() if output is None else nullcontext():
        evaluating.evaluate(directory, dataset, reporting.console(), how, config.seed, output)
