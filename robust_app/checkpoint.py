"""Files that are whole or not there, and that execute nothing when read."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_app import archives
from robust_app.errors import UserError, one_line

FORMAT = "robust-app 1"


def save(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values; a crash at any moment leaves the old file or the new one.

    Raises:
        UserError: if the disk is full or may not be written.
    """
    # Not into the file itself: broken off, torch ends its archive when it may be closed already,
    # and aborts the process.
    archive = io.BytesIO()
    try:
        torch.save(content, archive)
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    with replacing(path) as partial:
        partial.write_bytes(archive.getbuffer())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of ``path``, which it becomes when it is whole and on the disk.

    Of one that fails nothing is left: on a full disk its place is what the next attempt needs.

    Raises:
        UserError: if the disk is full or may not be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(path.parent)  # or the name would be of the old file again after a power cut
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        raise


def _sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system knows no such wish, as some of networks
            raise
    finally:
        os.close(handle)


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
        reason = "not a checkpoint of robust-app, or damaged; put a copy back, or train anew"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
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
