"""What a run works with, read again and seen to be its own: its data and its networks."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_app import checkpoint, data, documents
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.errors import SHOWN, UserError, one_line, shown
from robust_app.networks import build_network
from robust_app.overrides import differences
from robust_app.run_directory import RunDirectory


def content(config: Config, **values: Any) -> dict[str, Any]:
    """What a file of a run holds, with the configuration that it was made with."""
    return {"format": checkpoint.FORMAT, "config": config.to_toml()} | values


def check_config(saved: dict[str, Any], config: Config, path: Path) -> None:
    """See that a file was made with the configuration that the run has now.

    Where the data lie may have changed: that they are the same, their checksum tells.

    Raises:
        UserError: if it was made with another, or does not say with which.
    """
    try:
        made_with = Config.from_mapping(documents.parse_toml(saved["config"]))
    except (LookupError, TypeError, AttributeError, ValueError, UserError) as error:
        reason = f"holds no configuration that this version reads ({one_line(error)})"
        raise UserError(f"{path}: {reason}") from error
    found = differences(dataclasses.replace(made_with, dataset=config.dataset), config)
    if found:
        reason = "made with another configuration than config.toml has"
        raise UserError(f"{path}: {reason} ({found[:SHOWN]})")


def load_data(
    directory: RunDirectory,
    config: Config,
    data_root: Path | None,
    download: bool,
    device: torch.device | str,
) -> Dataset:
    """The data of a run, seen to be its own where it noted their checksum.

    Args:
        directory: of the run, or of one that has yet to begin.
        config: of the run.
        data_root: where the data lie; None for where the run found them last.
        download: see :func:`robust_app.data.load`.
        device: to put them on.

    Raises:
        UserError: if they are missing, damaged or others.
    """
    dataset = data.load(config.dataset, data_root or directory.data_root(), download).to(device)
    noted = [made["data"] for made in directory.environments() if "data" in made]
    if noted and dataset.checksum != noted[-1]:
        raise UserError(
            f"{directory.path}: made on other data than these ({shown(noted[-1])[:16]}…, found "
            f"{shown(dataset.checksum)[:16]}…); give the run's with --data-root"
        )
    return dataset


def load_network(
    directory: RunDirectory, dataset: Dataset, which: str
) -> tuple[nn.Sequential, int]:
    """A saved network of a run, on the device of the data, and the epoch it is of.

    Args:
        directory: of the run.
        dataset: the run's own.
        which: ``"best"``, ``"last"`` or ``"stage-S"``, as it was when stage S ended.

    Raises:
        UserError: if the file is missing, damaged, of another network or configuration.
    """
    path, config = directory.network_file(which), directory.config()
    if not path.exists():
        raise UserError(f"{path}: missing; a run has it once it has trained such an epoch itself")
    saved = checkpoint.load(path)
    if not {"network", "epoch"} <= saved.keys() or not isinstance(saved["epoch"], int):
        raise UserError(f"{path}: holds no network")
    check_config(saved, config, path)
    network = build_network(config, dataset)
    checkpoint.restore(network, saved["network"], path)
    return network.eval().to(dataset.x_test.device), saved["epoch"]
