"""What a run was made with: what is needed to repeat it."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mogd


def describe(
    device: torch.device, processes: int, seed: int, data_root: Path | None
) -> dict[str, Any]:
    """Command, commit, versions, machine, seed and where the data lay, for JSON.

    Args:
        device: what the run computes on.
        processes: how many share it.
        seed: of the run.
        data_root: folder of the data set, None if it needs none.
    """
    return {
        "command": sys.argv,
        "commit": _commit(),
        "seed": seed,
        "packages": {"mogd": mogd.__version__}
        | {name: _version(name) for name in ("torch", "torchvision", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": processes,
        "data_root": None if data_root is None else str(data_root.resolve()),
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two starts that may change the bits of a result; empty if nothing.

    >>> changes({"processes": 3, "threads": 1}, {"processes": 2, "threads": 1})
    'processes 2, was 3'
    """
    names = ("processes", "device", "threads", "execution", "commit", "python")
    was, found = (
        {name: start[name] for name in names if name in start} | start.get("packages", {})
        for start in (before, now)
    )
    return "; ".join(
        f"{name} {found[name]}, was {was[name]}"
        for name in found
        if name in was and found[name] != was[name]
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code that runs; None where no repository holds it."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        tracked = [*git, "ls-files", "--error-unmatch", here.name]
        subprocess.run(tracked, capture_output=True, check=True)
        answer = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
