"""The files of one training run; each is replaced whole, so that none is ever half written."""

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from robust_app import documents
from robust_app.checkpoint import replacing
from robust_app.config import Config
from robust_app.errors import UserError, reason, shown
from robust_app.metrics import SHOWN

METRICS = ("standard_error", "verified_error", "seconds")  # what is read of an epoch's metrics


class RunDirectory:
    """Where a run keeps its configuration, metrics, checkpoint, models and curves.

    Args:
        path: the folder; made by :meth:`locked`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.environment_file = path / "environment.json"
        self.origin_file = path / "origin.json"
        self.metrics_file = path / "metrics.jsonl"
        self.divergences_file = path / "divergences.jsonl"
        self.checkpoint_file = path / "checkpoint.pt"
        self.best_file = self.network_file("best")
        self.last_file = self.network_file("last")
        self.results_file = path / "results.json"
        self.curves_file = path / "curves.png"
        self.events_folder = path / "tensorboard"

    def network_file(self, name: str) -> Path:
        """A saved network, ``"best"``, ``"last"`` or ``"stage-S"``."""
        return self.path / f"{name}.pt"

    def stage_file(self, stage: int) -> Path:
        """The network as it was when a stage of layer-wise training ended."""
        return self.network_file(f"stage-{stage}")

    def stage_files(self) -> list[Path]:
        """The networks of all stages that have ended."""
        return sorted(self.path.glob(self.network_file("stage-*").name))

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
        except NotImplementedError as error:
            raise UserError(f"{self.path}: its file system has no locks") from error
        try:
            yield
        finally:
            lock.release()

    def check_free(self) -> None:
        """See that a new run would overwrite nothing.

        Raises:
            UserError: if the folder holds anything.
        """
        unbegun = {".lock", f"{self.config_file.name}.partial"}  # of a run killed before it began
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: not a folder")
            names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise UserError(f"{self.path}: cannot be used ({reason(error)})") from error
        if not unbegun.issuperset(names):
            resume = f"train --run-dir {shlex.quote(str(self.path))} --resume trains the run in it"
            found = resume if self.config_file.exists() else "there is no run in it"
            raise UserError(f"{self.path}: not empty; choose another folder ({found})")

    def start(self, config: Config) -> None:
        """Write the configuration of a new run.

        Raises:
            UserError: if the folder holds anything already.
        """
        self.check_free()
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Make the folder a run's; without its configuration it is none."""
        _write(self.config_file, config.to_toml())

    def origin(self) -> list[dict[str, Any]]:
        """The runs that a fork comes from, the first one first; none of a run that is no fork.

        Raises:
            UserError: if the file is damaged; so do those below that read one.
        """
        kinds = {"run": str, "epochs": int, "config": str}
        found = _read_list(self.origin_file, kinds)
        for entry in found:
            for key, kind in kinds.items():
                if not isinstance(entry[key], kind):
                    raise UserError(f"{self.origin_file}: damaged ({key} is no {kind.__name__})")
        return found

    def write_origin(self, origin: list[dict[str, Any]]) -> None:
        """Note what runs a fork comes from."""
        _write(self.origin_file, _json(origin, indent=2))

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            UserError: if there is no run here or its configuration is damaged.
        """
        try:
            return Config.from_mapping(documents.read_toml(self.config_file))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no run here (config.toml is missing)") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config_file}: cannot be read ({reason(error)})") from error
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from None

    def environments(self) -> list[dict[str, Any]]:
        """What each start of the run was made with, oldest first."""
        return _read_list(self.environment_file, ("device", "data_root"))

    def last_environment(self) -> dict[str, Any]:
        """What the last start of the run was made with; empty before the first."""
        return next(reversed(self.environments()), {})

    def data_root(self) -> Path | None:
        """Where the run found its data when it was last started, if it was told."""
        roots = [made["data_root"] for made in self.environments() if made["data_root"]]
        if not all(map(_is_path, roots)):
            raise UserError(f"{self.environment_file}: damaged (a data_root that is no path)")
        return Path(roots[-1]) if roots else None

    def on_divergence(self) -> str | None:
        """What the run was to do on divergence when it was last started, if it was told."""
        return self.last_environment().get("on_divergence")

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Append what this start of the run is made with to ``environment.json``."""
        text = _json([*self.environments(), environment], indent=2)
        _write(self.environment_file, text)

    def metrics(self) -> list[dict[str, Any]]:
        """One mapping an epoch, in order; what is shown of it is a number or None.

        Raises:
            UserError: the file is damaged.
        """
        found = _read_list(self.metrics_file, ("epoch", *METRICS), lines=True)
        if [line["epoch"] for line in found] != list(range(1, len(found) + 1)):
            raise UserError(f"{self.metrics_file}: damaged (its epochs do not count from 1)")
        for key in {*METRICS, *(metric.key for metric in SHOWN)}:
            known = int | float if key == "seconds" else int | float | None
            if not all(isinstance(line.get(key), known) for line in found):
                raise UserError(f"{self.metrics_file}: damaged ({key} is not a number)")
        marks = [line.get("taken_over") for line in found]
        taken_over = marks.count(True)
        if marks != taken_over * [True] + (len(marks) - taken_over) * [None]:
            raise UserError(f"{self.metrics_file}: damaged (taken_over is not of the first epochs)")
        if any((line[METRICS[0]] is None) != (line[METRICS[1]] is None) for line in found):
            raise UserError(f"{self.metrics_file}: damaged (one of two errors is missing)")
        return found

    def write_metrics(self, metrics: list[dict[str, Any]]) -> None:
        """Replace the metrics of all epochs."""
        _write(self.metrics_file, "".join(map(_json, metrics)))

    def divergences(self) -> list[dict[str, Any]]:
        """Where the run diverged, each time that it went back, and the scale from then on."""
        return _read_list(self.divergences_file, ("where", "learning_rate_scale"), lines=True)

    def add_divergence(self, where: str, scale: float) -> None:
        """Append to ``divergences.jsonl``.

        A run that was killed before its checkpoint was written diverges there again, and says it
        once.
        """
        found, new = self.divergences(), {"where": where, "learning_rate_scale": scale}
        if new not in found:
            _write(self.divergences_file, "".join(map(_json, [*found, new])))

    def results(self) -> list[dict[str, Any]]:
        """Every evaluation of the run, oldest first."""
        return _read_list(self.results_file, ("network",))

    def add_results(self, results: list[dict[str, Any]]) -> None:
        """Append evaluations to ``results.json``."""
        _write(self.results_file, _json([*self.results(), *results], indent=2))


def next_free(parent: Path, name: str) -> Path:
    """The first of ``parent/name-1``, ``-2``, … that does not exist.

    Raises:
        UserError: no folder can have such a name.
    """
    number = 1
    try:
        while (path := parent / f"{name}-{number}").exists():
            number += 1
    except OSError as error:
        found = f"no folder can be called {shown(path.name)} ({reason(error)})"
        raise UserError(f"--run-dir: needed, for {found}") from error
    return path


def _is_path(value: object) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _json(content: Any, indent: int | None = None) -> str:
    """As :mod:`robust_app.documents` reads it again, which takes finite numbers alone."""
    return json.dumps(content, indent=indent, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _read_list(path: Path, keys: Iterable[str], lines: bool = False) -> list[dict[str, Any]]:
    """The mappings, with these keys, of a JSON list or of JSON lines; none if there is no file."""
    try:
        found = documents.read_json(path, lines)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path}: cannot be read (expected mappings)")
    missing = sorted({key for entry in found for key in keys if key not in entry})
    if missing:
        raise UserError(f"{path}: damaged (entries without {', '.join(missing)})")
    return found
