"""The training loop (paper, Algorithm 2)."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mogd import Threshold, UnbiasedMultiGradient, parallel
from robust_app import batches, data, methods, models
from robust_app.attacks import uniform_start
from robust_app.bounds import certified
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.evaluation import standard_and_certified
from robust_app.fosc import Stationarity
from robust_app.losses import Objective
from robust_app.schedules import Phase, Setting, setting


class Watcher(Protocol):
    """Who is told how training goes."""

    def batch(self, epoch: int, batch: int, batches: int, now: Setting, means: "Means") -> None:
        """After each step; ``means`` of the epoch so far stay on the device until asked for."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """After each epoch is saved, with its line of ``metrics.jsonl``."""


@dataclass
class Means:
    """Averages over an epoch of what its steps report, kept on the device."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        """Count one step's values, each 0-dim."""
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, over: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, float]:
        """The averages of this process, or over what ``over`` takes them to; asks the device."""
        return {name: float(over(total / self.counts[name])) for name, total in self.sums.items()}


class Trainer:
    """A network, its optimizer and its data, trained one epoch at a time.

    Args:
        config: the run; the same config gives the same bits on the same machine.
        dataset: what to train on; the test part is not touched.
        world: the processes that share the work.

    Raises:
        UserError: if a name is unknown, or the data do not fit the model or the batch size.
    """

    def __init__(self, config: Config, dataset: Dataset, world: World) -> None:
        if config.batch_size % world.size:
            raise UserError(
                f"batch_size: expected a multiple of the {world.size} processes, "
                f"found {config.batch_size}"
            )
        self.config, self.world = config, world
        parts = data.split(dataset, config.held_out, config.seed)
        self.x, self.labels, self.held_out_x, self.held_out_labels = (
            part.to(world.device) for part in parts
        )
        if len(self.x) < config.batch_size:
            raise UserError(
                f"batch_size: expected at most the {len(self.x)} training images, "
                f"found {config.batch_size}"
            )
        torch.manual_seed(config.seed)
        self.network = build_network(config, dataset).to(world.device)
        self.objective = world.wrap(Objective(self.network))
        self.stationarity = Stationarity()
        self.priority = Threshold(self.stationarity, limit=config.fosc_maximum)
        self.optimizer = UnbiasedMultiGradient(
            self.network.parameters(),
            torch.optim.Adam,
            lr=config.learning_rate,
            moment_decay=config.moment_decay,
            rule=methods.find(config.method).rule(config),
            priority=self.priority,
        )
        self.epochs_done = 0

    def state_dict(self) -> dict[str, Any]:
        """All that changes from epoch to epoch."""
        return {
            "epochs_done": self.epochs_done,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def train_epoch(self, watcher: Watcher) -> dict[str, Any]:
        """Train one epoch and measure the held-out images.

        Returns:
            The epoch's line of ``metrics.jsonl``.

        Raises:
            UserError: if a loss or gradient is not finite; says where.
        """
        started = time.perf_counter()
        epoch, means = self.epochs_done, Means()
        steps = len(self.x) // self.config.batch_size
        now = setting(self.config, epoch)
        self.network.train()
        for number, (x, labels, start) in enumerate(self._batches(epoch)):
            now = setting(self.config, epoch + number / steps)
            epsilon = torch.full((), now.epsilon, device=self.world.device)
            batch = methods.Batch(x, labels, start, epsilon)
            try:
                self._step(batch, now, means)
            except FloatingPointError as error:
                raise _diverged(f"epoch {epoch + 1}, batch {number + 1}: {error}") from error
            watcher.batch(epoch, number + 1, steps, now, means)
        averages = means.read(over=parallel.average)
        # The optimizer looks at both losses of each joint step; the warm-up is looked at here.
        finite = all(parameter.isfinite().all() for parameter in self.network.parameters())
        if not finite or not all(map(math.isfinite, averages.values())):
            raise _diverged(f"epoch {epoch + 1}: a mean loss or a parameter is not finite")
        self.epochs_done += 1
        return {
            "epoch": self.epochs_done,
            "phase": now.phase.value,
            "epsilon": now.epsilon,
            "fosc_threshold": now.fosc_threshold,
            "learning_rate": now.learning_rate,
            **averages,
            **self._measure(),
            "seconds": time.perf_counter() - started,
        }

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's images, labels and random starts, a function of seed and epoch alone."""
        seed = int(np.random.SeedSequence([self.config.seed, epoch]).generate_state(1)[0])
        generator = torch.Generator(self.world.device).manual_seed(seed)
        for indices in batches.shuffled_batches(
            len(self.x), self.config.batch_size, generator, self.world.device
        ):
            x = batches.as_float(self.x[indices])
            if self.config.augment:
                x = batches.augment(x, generator)
            start = uniform_start(x, generator)
            share = self.world.share
            yield share(x), share(self.labels[indices]), share(start)

    def _step(self, batch: methods.Batch, now: Setting, means: Means) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = now.learning_rate
        if now.phase is Phase.JOINT:
            self._joint_backward(batch, now, means)
        else:
            self._warm_up_backward(batch, now, means)
        if self.config.gradient_clip < math.inf:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
        self.optimizer.step()

    def _warm_up_backward(self, batch: methods.Batch, now: Setting, means: Means) -> None:
        """Procedure WARMUP: one loss, natural or adversarial."""
        x = batch.x
        if now.phase is Phase.ADVERSARIAL:
            x = methods.attack(self.network, batch, self.config.attack_step).detach()
        self.optimizer.zero_grad()
        loss = self.objective(x, batch.labels)
        loss.backward()
        means.add(**{f"{now.phase.value}_loss": loss})

    def _joint_backward(self, batch: methods.Batch, now: Setting, means: Means) -> None:
        """The main loop: both losses, weighed by their past."""
        self.priority.limit = now.fosc_threshold
        record = self.optimizer.backward(
            methods.joint_losses(
                self.objective, self.network, batch, self.config.attack_step, self.stationarity
            )
        )
        assert record is not None  # only None while accumulating
        for index, name in enumerate(methods.LOSSES):
            means.add(
                **{f"{name}_loss": record.losses[index], f"{name}_weight": record.weights[index]}
            )
        means.add(conflicts=record.conflict)
        means.add(certified_first=record.conflict & (record.prioritized == 1))

    def _measure(self) -> dict[str, Any]:
        """Errors on the held-out images in percent; None where none are held out."""
        if len(self.held_out_x) == 0:
            return {"standard_error": None, "verified_error": None}
        self.network.eval()
        counts = standard_and_certified(
            self.network,
            self.world.share(self.held_out_x),
            self.world.share(self.held_out_labels),
            self.config.evaluation_epsilon,
            certified,
        )
        wrong, proved = self.world.total(counts).tolist()
        return {
            "standard_error": 100 * wrong / len(self.held_out_x),
            "verified_error": 100 * (len(self.held_out_x) - proved) / len(self.held_out_x),
        }


def _diverged(where: str) -> UserError:
    return UserError(
        f"training diverged in {where}; the checkpoint before it is whole "
        "(try a lower learning_rate)"
    )


def build_network(config: Config, dataset: Dataset) -> nn.Sequential:
    """The network of a run, initialised from torch's current seed.

    Raises:
        UserError: if the model is unknown or the images do not fit it.
    """
    return models.build(
        config.model,
        input_shape=dataset.image_shape,
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
    )
