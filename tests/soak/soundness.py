"""What must hold of a run's directory at every moment, and of two that ought to be equal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robust_app import checkpoint
from robust_app.run_directory import RunDirectory

PNG = (b"\x89PNG", b"IEND\xaeB`\x82")


class Unsound(Exception):
    """Something was lost, or is not what it should be."""


def epochs_done(folder: Path) -> int | None:
    """Of the checkpoint; None where there is none yet."""
    file = RunDirectory(folder).checkpoint_file
    return int(checkpoint.load(file)["epochs_done"]) if file.exists() else None


def check(folder: Path, at_least: int | None = None) -> None:
    """See that every file of a run is whole, whenever it was killed.

    Args:
        folder: of the run; need not exist.
        at_least: epochs that its checkpoint has held before.

    Raises:
        Unsound, UserError: a file is not whole, or the checkpoint is older than it was.
    """
    directory = RunDirectory(folder)
    if not directory.config_file.exists():
        found = [file.name for file in folder.glob("*")]
        if set(found) - {".lock", "config.toml.partial"}:
            raise Unsound(f"no configuration beside {found}")
        return
    directory.config()
    directory.environments()
    directory.results()
    text = directory.metrics_file.read_text() if directory.metrics_file.exists() else ""
    if text and not text.endswith("\n"):
        raise Unsound("the metrics end in half a line")
    epochs = [json.loads(line)["epoch"] for line in text.splitlines()]
    done = epochs_done(folder)
    if epochs != list(range(1, len(epochs) + 1)) or len(epochs) < (done or 0):
        raise Unsound(f"metrics of the epochs {epochs}, a checkpoint of {done}")
    if at_least is not None and (done is None or done < at_least):
        raise Unsound(f"the checkpoint is of {done} epochs after one of {at_least}")
    for file in folder.glob("*.pt"):
        checkpoint.load(file)
    if directory.curves_file.exists():
        content = directory.curves_file.read_bytes()
        if not content.startswith(PNG[0]) or not content.endswith(PNG[1]):
            raise Unsound("half a picture")


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs differ, in more than the seconds they took; empty if nowhere."""
    first, second = outcome(one), outcome(other)
    different = [name for name in first if not _equal(first[name], second.get(name))]
    left = [file.name for file in other.glob("*.partial")]
    return different + sorted(second.keys() - first.keys()) + left


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run has found, by file."""
    directory = RunDirectory(folder)
    found: dict[str, Any] = {"config": directory.config()}
    for file in sorted(folder.glob("*.pt")):
        found[file.name] = flat(checkpoint.load(file))
    found["metrics"] = _without_seconds(directory.metrics())
    results = directory.results()
    per_evaluation = len({row["network"] for row in results})
    found["results"] = _without_seconds(results[-per_evaluation:])
    found["curves"] = directory.curves_file.exists()
    return found


def flat(content: Any, at: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists, by their paths.

    >>> flat({"a": [1, {"b": 2}]})
    {'/a/0': 1, '/a/1/b': 2}
    """
    if isinstance(content, Mapping):
        parts = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        parts = [(str(index), value) for index, value in enumerate(content)]
    else:
        return {at: content}
    return {path: leaf for key, value in parts for path, leaf in flat(value, f"{at}/{key}").items()}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        return same and one.shape == other.shape and _bits(one) == _bits(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nor what they were found with, which has the names of folders."""
    return [
        {
            path: leaf
            for path, leaf in flat(row).items()
            if not path.endswith("seconds") and not path.startswith("/environment")
        }
        for row in rows
    ]
