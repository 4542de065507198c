"""What a part has found, as JSON with the facts of the machine."""

import json
from pathlib import Path
from typing import Any

import torch

from robust_app import environment
from tests.benchmarks.__main__ import processor
from tests.soak.effort import QUICK, Effort


def save(part: str, effort: Effort, found: dict[str, Any], folder: Path) -> None:
    """Write ``reliability-PART.json``."""
    made = environment.describe(torch.device("cpu"), processes=1, seed=0, data_root=None)
    facts = {
        "processor": processor(),
        "platform": made["platform"],
        "python": made["python"],
        "torch": torch.__version__,
        "threads": made["threads"],
        "commit": made["commit"],
        "command": f"python -m tests.soak {part}{' --quick' if effort == QUICK else ''}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made with": facts, **found}, indent=2, ensure_ascii=False)
    (folder / f"reliability-{part}.json").write_text(text + "\n", encoding="utf-8")
