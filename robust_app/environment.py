"""What a run was made with: what is needed to repeat it."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mogd

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG")
"""Of the system's environment: they choose between kernels."""


def describe(
    device: torch.device, processes: int, seed: int | list[int] | str, data_root: Path | None
) -> dict[str, Any]:
    """What computes what, and with what: for JSON.

    Command, commit (with ``-dirty`` where files differ from it), versions, machine, settings that
    decide which of several roundings an operation has, seed and where the data lay.

    Args:
        device: what the run computes on.
        processes: how many share it.
        seed: of the run, or what to say of several.
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


FACTS = (
    *("commit", "packages", "python", "platform", "processor", "cpu_capability", "device", "cuda"),
    *("threads", "settings", "processes", "execution"),
)
"""Of a start of a run: what its figures may depend on."""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Facts in which two starts differ, so that they may end with other bits.

    What one of them did not note, as older versions did not, is not compared.

    >>> list(differences({"processes": 3, "threads": 1}, {"processes": 2, "threads": 1}))
    ['processes: 3, here 2']
    """
    for name in FACTS:
        if name in there and name in here:
            yield from _difference(name, there[name], here[name])


def _difference(name: str, there: Any, here: Any) -> Iterator[str]:
    """What to say of a fact, or of each of several under one name.

    >>> list(_difference("packages", {"torch": "2.11", "numpy": "2"}, {"torch": "2.12"}))
    ['torch: 2.11, here 2.12', 'numpy: 2, here unknown']
    >>> list(_difference("commit", "1a2b-dirty", "1a2b-dirty"))
    ['commit: 1a2b-dirty, changed by what is not known, here 1a2b-dirty']
    """
    if isinstance(there, Mapping):
        others = here if isinstance(here, Mapping) else {}
        for key in {**there, **others}:
            yield from _difference(key, there.get(key), others.get(key))
        return
    changed = isinstance(there, str) and name == "commit" and there.endswith("-dirty")
    if there != here or changed:
        shown = ["unknown" if value is None else str(value) for value in (there, here)]
        by = ", changed by what is not known" if changed else ""
        yield f"{name}: {shown[0]}{by}, here {shown[1]}"


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
