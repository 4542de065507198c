"""What became of the damaged files, as a table and as JSON."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from robust_app import environment
from robust_app.checkpoint import replacing
from tests.benchmarks.__main__ import processor
from tests.fuzz.running import ADDRESSES, MEBIBYTES, SECONDS, Tally

NAME = "reliability-files.json"


def facts(command: str, seed: int) -> dict[str, Any]:
    """What the figures depend on."""
    found = environment.describe(torch.device("cpu"), processes=1, seed=seed, data_root=None)
    packages = ("torch", "torchvision", "numpy", "onnx", "onnxruntime")
    return {
        "command": command,
        "seed": seed,
        "commit": found["commit"],
        "processor": processor(),
        "platform": found["platform"],
        "Python": found["python"],
        "packages": {name: version(name) for name in packages},
        "bounds": {"seconds": SECONDS, "MiB in use": MEBIBYTES, "MiB of addresses": ADDRESSES},
    }


def save(facts: Mapping[str, Any], tallies: Mapping[str, Tally], folder: Path) -> None:
    """Write the tallies; formats that were tried earlier and not now are kept."""
    file, formats = folder / NAME, dict[str, Any]()
    if file.exists():
        formats = json.loads(file.read_text(encoding="utf-8"))
    for name, tally in tallies.items():
        seconds, number = tally.slowest
        formats[name] = {
            "files": tally.files,
            "loaded": tally.loaded,
            "refused": sum(tally.refused.values()),
            "refused by": dict(tally.refused.most_common()),
            "failed": {str(number): why for number, why in tally.failed.items()},
            "slowest": {"seconds": round(seconds, 3), "number": number},
            "could not be made": tally.unmade,
            "growth in MiB": round(tally.growth, 1),
            "facts": dict(facts),
        }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        text = json.dumps(formats, indent=1, ensure_ascii=False)
        partial.write_text(f"{text}\n", encoding="utf-8")


def table(tallies: Mapping[str, Tally]) -> Table:
    """A row a format."""
    columns = ("format", "files", "loaded", "refused", "failed", "slowest, s", "growth, MiB")
    made = Table(*columns, title="damaged files")
    for name, tally in tallies.items():
        counts = (tally.files, tally.loaded, sum(tally.refused.values()), len(tally.failed))
        made.add_row(name, *map(str, counts), f"{tally.slowest[0]:.2f}", f"{tally.growth:.0f}")
    return made
