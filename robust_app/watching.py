"""How training goes, for whoever watches it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from robust_app.schedules import Setting


class Watcher(Protocol):
    """Who is told how training goes."""

    def batch(self, epoch: int, batch: int, batches: int, now: Setting, means: "Means") -> None:
        """After each step, with the ``means`` of the epoch so far.

        On a GPU, for which nobody waits within an epoch, these are empty.
        """

    def epoch(self, metrics: dict[str, Any]) -> None:
        """After each epoch is saved, with its line of ``metrics.jsonl``."""

    def note(self, text: str) -> None:
        """Of what is out of the ordinary, in a line."""


@dataclass(frozen=True)
class Watchers:
    """Several watchers, each told in turn."""

    watchers: Sequence[Watcher]

    def batch(self, epoch: int, batch: int, batches: int, now: Setting, means: "Means") -> None:
        """Tell each."""
        for watcher in self.watchers:
            watcher.batch(epoch, batch, batches, now, means)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Tell each."""
        for watcher in self.watchers:
            watcher.epoch(metrics)

    def note(self, text: str) -> None:
        """Tell each."""
        for watcher in self.watchers:
            watcher.note(text)


@dataclass
class Means:
    """Averages over an epoch of what its steps report, kept on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step's values, each 0-dim."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            self.sums[name] += value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, over: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """The averages of this process, or over what ``over`` takes them to; asks the device."""
        return {name: float(over(total / self.counts[name])) for name, total in self.sums.items()}
