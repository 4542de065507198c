"""The file of ``robust-app evaluate --output``: errors that are kept in no run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from robust_app import documents
from robust_app.checkpoint import replacing
from robust_app.errors import UserError, reason
from robust_app.run_directory import RunDirectory

KEYS = {"network", "dataset", "epsilon", "pgd_steps", "verifiers"}
"""What all such results have: a file that is there already is only replaced if it has them."""


def check(output: Path) -> None:
    """See that results can be written there, and take the place of nothing but results.

    Raises:
        UserError: there is no such folder, it is a run's, whose files have their names, or the file
            is something else: the network, perhaps.
    """
    try:
        found = _is_there(output)
        if output.is_dir():
            raise UserError(f"--output: expected a file to write, found the folder {output}")
        file = output.resolve()
        _is_there(file.with_name(f"{file.name}.partial"))  # nor may this name be too long
        folder = file.parent
        if not folder.is_dir():
            raise UserError(f"--output: {output}: cannot be written (there is no folder {folder})")
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output: {output}: cannot be written ({reason(error)})") from error
    run = RunDirectory(folder)
    if run.config_file.exists() and run.environment_file.exists():
        raise UserError(f"--output: expected a file outside of the run {folder}, found {output}")
    if found and not _replaceable(output):
        raise UserError(
            "--output: expected a new file, an empty one or results of such an evaluation, "
            f"found {output}"
        )


def write(output: Path, results: Mapping[str, Any]) -> None:
    """Write results where a link leads, and keep the mode of a file that is there.

    Raises:
        UserError: it cannot be written; see also :func:`check`.
    """
    check(output)  # once more: the evaluation took its time
    file = output.resolve()
    with replacing(file) as partial:
        replaces = file.exists()
        if replaces:
            partial.touch(mode=0o600)  # for nobody else until it has the mode of the file
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if replaces:
            shutil.copymode(file, partial)


def _is_there(path: Path) -> bool:
    """Whether there is something where a path leads; an OSError if that is nowhere."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _replaceable(file: Path) -> bool:
    if not file.is_file():  # but a pipe or a device
        return False
    try:
        return file.stat().st_size == 0 or documents.read_json(file).keys() >= KEYS
    except (OSError, ValueError, AttributeError):
        return False
