"""What a run was made with: what is needed to repeat it."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mogd

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG")
"""Of the system's environment: they choose between kernels."""


def describe(
    device: torch.device, processes: int, seed: int, data_root: Path | None
) -> dict[str, Any]:
    """What computes what, and with what: for JSON.

    Command, commit (with ``-dirty`` where files differ from it), versions, machine, settings that
    decide which of several roundings an operation has, seed and where the data lay.

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
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "settings": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "mkldnn": torch.backends.mkldnn.enabled,
        }
        | {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "processes": processes,
        "data_root": None if data_root is None else str(data_root.resolve()),
    }


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
