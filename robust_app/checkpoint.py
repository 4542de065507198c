"""Files that are whole or not there, and that execute nothing when read."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_app.errors import UserError


def save(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values; a crash at any moment leaves the old file or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote, onto the CPU, executing nothing.

    Raises:
        UserError: if the file is missing or not such a file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused here anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a checkpoint of robust-app") from error
    if not isinstance(content, dict) or content.get("format") != "robust-app 1":
        raise UserError(f"{path}: not a checkpoint of robust-app")
    return content


def restore(network: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load a network's parameters.

    Raises:
        UserError: if they are of another network.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: holds another network ({reason})") from error
