"""The files of one training run."""

import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from robust_app.config import Config
from robust_app.errors import UserError


class RunDirectory:
    """Where a run keeps its configuration, metrics, checkpoint, models and curves.

    Args:
        path: the folder; made by :meth:`start`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoint_file = path / "checkpoint.pt"
        self.best_file = path / "best.pt"
        self.last_file = path / "last.pt"
        self.results_file = path / "results.json"
        self.curves_file = path / "curves.png"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; the lock dies with it.

        Raises:
            UserError: if another process holds it or the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise UserError(f"{self.path}: in use by another run") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config_file.exists()

    def start(self, config: Config) -> None:
        """Write down the configuration and what it runs on.

        Raises:
            UserError: if the folder holds anything already.
        """
        if any(entry.name != ".lock" for entry in self.path.iterdir()):
            raise UserError(
                f"{self.path}: not empty; add --resume to continue the run in it, or choose another"
            )
        self.config_file.write_text(config.to_toml(), encoding="utf-8")

    def describe_environment(self, device: torch.device, processes: int) -> None:
        """Write what is needed to repeat the run into ``environment.json``."""
        environment = {
            "command": sys.argv,
            "commit": _commit(),
            "packages": {name: version(name) for name in ("torch", "torchvision", "numpy")},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "processes": processes,
        }
        text = json.dumps(environment, indent=2) + "\n"
        (self.path / "environment.json").write_text(text, encoding="utf-8")

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            UserError: if there is no run here or its configuration is damaged.
        """
        try:
            return Config.from_mapping(tomllib.loads(self.config_file.read_text("utf-8")))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no run here (config.toml is missing)") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config_file}: cannot be read ({error})") from error
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from None

    def metrics(self) -> list[dict[str, Any]]:
        """One mapping an epoch, in order."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def write_metrics(self, metrics: list[dict[str, Any]]) -> None:
        """Replace the metrics, so that a crash never leaves half a line."""
        text = "".join(json.dumps(epoch) + "\n" for epoch in metrics)
        _replace_text(self.metrics_file, text)

    def add_result(self, result: dict[str, Any]) -> None:
        """Append an evaluation to ``results.json``, a list."""
        results = []
        if self.results_file.exists():
            results = json.loads(self.results_file.read_text(encoding="utf-8"))
        _replace_text(self.results_file, json.dumps([*results, result], indent=2) + "\n")


def next_free(parent: Path, name: str) -> Path:
    """The first of ``parent/name-1``, ``-2``, … that does not exist."""
    number = 1
    while (path := parent / f"{name}-{number}").exists():
        number += 1
    return path


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _commit() -> str | None:
    """The commit of the code that runs; None where it is not in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
