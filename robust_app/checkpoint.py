"""Files that are whole or not there, and that execute nothing when read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_app import archives
from robust_app.errors import UserError, one_line


def save(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values; a crash at any moment leaves the old file or the new one.

    Raises:
        UserError: if the disk is full or may not be written.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # Interrupted, torch still tries to end its archive, and fails with an error of its own.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of ``path``, which it becomes when it is whole.

    Raises:
        UserError: if the disk is full or may not be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote, onto the CPU, executing nothing.

    Raises:
        UserError: if the file is missing or not such a file.
    """
    try:
        content = archives.read_tensors(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
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
    # Of what is no mapping of tensors, torch finds out in many ways.
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: holds another network ({one_line(error)})") from error
