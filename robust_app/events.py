"""Metrics as scalars for TensorBoard."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from robust_app.errors import UserError
from robust_app.metrics import SHOWN, Metrics, values
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory


def summary_writer() -> Any:
    """The class that writes events.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        return import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from error


class Events(Silent):
    """Writes each epoch's metrics into a run's folder of events, as scalars ``group/key``.

    The events are a copy of ``metrics.jsonl``: the first epoch that is told replaces what an
    earlier start of the run has left by all epochs so far. So no epoch is there twice, or missing.

    Args:
        directory: of the run, locked.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._make_writer = summary_writer()
        self._writer: Any = None
        self._excepthook = threading.excepthook
        threading.excepthook = self._fail_in_a_thread

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Write the epoch's scalars, and those of all epochs before it if it is the first told."""
        if self._writer is None:
            self._begin()
        else:
            self._write([metrics])

    def close(self) -> None:
        """End the file, with all epochs of the run even if none was told."""
        try:
            if self._writer is None:
                self._begin()
            with self._refusing():
                self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _begin(self) -> None:
        folder, metrics = self.directory.events_folder, self.directory.metrics()
        with self._refusing():
            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
            # A TensorBoard that has read the old file forgets its steps when it sees this one.
            self._writer = self._make_writer(str(folder), purge_step=0)
        self._write(metrics)

    def _write(self, metrics: Metrics) -> None:
        with self._refusing():
            for metric in SHOWN:
                for epoch, value in values(metrics, metric.key).items():
                    self._writer.add_scalar(f"{metric.group}/{metric.key}", value, epoch)
            self._writer.flush()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = self.directory.events_folder
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error

    def _fail_in_a_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Leave what TensorBoard's thread cannot write to the next call, which raises it too."""
        if not isinstance(failed.exc_value, OSError):
            self._excepthook(failed)
