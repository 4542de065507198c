"""The file of ``robust-app evaluate --output``: errors that are kept in no run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust_app import documents
from robust_app.checkpoint import replacing
from robust_app.errors import UserError

KEYS = {"network", "dataset", "epsilon"}
"""What all such results have: a file that is there already is only replaced if it has them."""


def check(output: Path) -> None:
    """See that results can be written there, and take the place of nothing but results.

    Raises:
        UserError: there is no such folder, or the file is something else: the network, perhaps.
    """
    if output.is_dir():
        raise UserError(f"--output: expected a file to write, found the folder {output}")
    if not output.resolve().parent.is_dir():
        raise UserError(f"{output}: cannot be written (there is no folder {output.parent})")
    if output.exists() and not _replaceable(output):
        raise UserError(
            "--output: expected a new file, an empty one or results of such an evaluation, "
            f"found {output}"
        )


def write(output: Path, results: Mapping[str, Any]) -> None:
    """Write results where a link leads, and keep the mode of a file that is there.

    Raises:
        UserError: it cannot be written.
    """
    file = output.resolve()
    with replacing(file) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if file.exists():
            shutil.copymode(file, partial)


def _replaceable(file: Path) -> bool:
    if not file.is_file():  # but a pipe or a device
        return False
    try:
        return file.stat().st_size == 0 or documents.read_json(file).keys() >= KEYS
    except (OSError, ValueError, AttributeError):
        return False
