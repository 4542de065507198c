"""The training loop (paper, Algorithm 2)."""

import dataclasses
import math
import time
from typing import Any

import torch
from torch import nn

from mogd import UnbiasedMultiGradient, parallel
from robust_app import (
    batch_norm,
    batches,
    data,
    methods,
    precision,
    preconditions,
    training_state,
)
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.divergence import Diverged, all_finite, described
from robust_app.epochs import held_out_errors, training_batches
from robust_app.evaluation import CHUNK
from robust_app.execution import Eager
from robust_app.folding import fold
from robust_app.layerwise import split
from robust_app.networks import build_network
from robust_app.schedules import Setting, setting
from robust_app.stage import Stage
from robust_app.watching import Means, Watcher


class Trainer:
    """A network, its stage and its data, trained one epoch at a time.

    Args:
        config: the run; the same config gives the same bits on the same machine.
        dataset: what to train on; the test part is not touched.
        world: the processes that share the work.
        execution: how steps are run; one of :data:`robust_app.capture.EXECUTIONS`. It changes
            what the run computes by rounding alone.

    Attributes:
        network: all layers, also those that a layer-wise stage has frozen.
        stage: what trains now, and its optimizer.
        learning_rate_scale: multiplies the learning rate that the schedule says.

    Raises:
        UserError: if a name is unknown, the method does not fit the configuration, the data do
            not fit the model or the batch size, or the device does not fit the precision or the
            execution.
    """

    def __init__(
        self, config: Config, dataset: Dataset, world: World, execution: type[Eager] = Eager
    ) -> None:
        preconditions.check(config, dataset, world, execution)
        self.config, self.world, self.execution = config, world, execution
        self.dataset = dataset
        parts = data.split(dataset, config.held_out, config.seed)
        self.x, self.labels, self.held_out_x, self.held_out_labels = (
            part.to(world.device) for part in parts
        )
        preconditions.check_batch(config, len(self.x))
        self._initialize()
        split(self.network, config.stages)  # refuses a stage beyond the last layer now
        self.epochs_done = 0
        self.learning_rate_scale = 1.0
        self.begin_stage(0)

    def _initialize(self) -> None:
        """The network as training begins."""
        torch.manual_seed(self.config.seed)
        network = build_network(self.config, self.dataset, trainable=True)
        self.network = network.to(self.world.device)

    def begin_stage(self, number: int) -> None:
        """Freeze the layers before the stage's input; a fresh optimizer for the rest (A.6).

        BatchNorm is folded away before the first layer-wise stage.
        """
        if number > 0:
            self.network = fold(self.network)
        self.stage = Stage(number, self.network, self.config, self.world, self.execution)
        with torch.no_grad():
            self.input_shape = self.stage.frozen(batches.as_float(self.x[:1])).shape[1:]
        self.run_step = self.execution(self.stage.step, self.world.device)

    @property
    def optimizer(self) -> UnbiasedMultiGradient:
        """Of the layers that train now."""
        return self.stage.optimizer

    def state_dict(self) -> dict[str, Any]:
        """All that changes from epoch to epoch."""
        return {
            "epochs_done": self.epochs_done,
            "learning_rate_scale": self.learning_rate_scale,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, to the same bits on the CPU.

        Raises:
            LookupError, ValueError, TypeError, AttributeError, RuntimeError: the state is of
                another run.
        """
        done = training_state.epochs_done(state, self.config.total_epochs)
        scale = training_state.learning_rate_scale(state)
        self._initialize()  # a later stage has frozen and folded layers
        self.begin_stage(setting(self.config, max(done - 1, 0)).stage)
        self.network.load_state_dict(state["network"])
        training_state.restore_adam(self.optimizer, state["optimizer"])
        self.epochs_done, self.learning_rate_scale = done, scale

    def certifiable(self) -> nn.Module:
        """The network as it is evaluated and saved: in evaluation mode, BatchNorm folded away."""
        return fold(self.network).eval()

    def train_epoch(self, watcher: Watcher) -> dict[str, Any]:
        """Train one epoch and measure the held-out images.

        Returns:
            The epoch's line of ``metrics.jsonl``.

        Raises:
            Diverged: if a loss or gradient is not finite, in every process alike; says where.
        """
        started = time.perf_counter()
        epoch, means = self.epochs_done, Means()
        steps = len(self.x) // self.config.batch_size
        now = self._setting(epoch)
        if now.stage != self.stage.number:
            self.begin_stage(now.stage)
        self.stage.faults.forget()
        self.stage.losses.network.train()
        drawn = training_batches(
            self.x, self.labels, self.input_shape, self.config, epoch, self.world
        )
        for number, (x, labels, start) in enumerate(drawn):
            now = self._setting(epoch + number / steps)
            batch_norm.freeze_first(self.network, now.first_batch_norm_frozen)
            with precision.products_in(self.config.precision):
                report = self.run_step(now, x, labels, start)
            if not self.world.on_gpu:  # to look there would be to wait
                self._check_steps(epoch, steps)
            means.add(report)
            watcher.batch(epoch, number + 1, steps, now, Means() if self.world.on_gpu else means)
        averages = means.read(over=parallel.average)
        self._check_steps(epoch, steps)
        self._estimate_statistics()
        self._check_outcome(epoch, averages)
        self.epochs_done += 1
        return {
            "epoch": self.epochs_done,
            "stage": now.stage,
            "phase": now.phase.value,
            "epsilon": now.epsilon,
            "fosc_threshold": now.fosc_threshold,
            "learning_rate": now.learning_rate,
            "learning_rate_scale": self.learning_rate_scale,
            **averages,
            **held_out_errors(
                self.certifiable(), self.held_out_x, self.held_out_labels, self.config, self.world
            ),
            "seconds": time.perf_counter() - started,
        }

    def _setting(self, t: float) -> Setting:
        """What the schedules say, with the learning rate that the run has come down to."""
        now = setting(self.config, t)
        return dataclasses.replace(now, learning_rate=now.learning_rate * self.learning_rate_scale)

    def _check_steps(self, epoch: int, steps: int) -> None:
        """Raise Diverged if a loss or gradient of the epoch's steps so far was not finite."""
        found = self.stage.faults.found()
        if found is not None:
            batch, indices = found
            phase = setting(self.config, epoch + (batch - 1) / steps).phase
            names = methods.losses_of(self.stage.method, phase)
            what = described([names[index] for index in indices])
            raise Diverged(f"epoch {epoch + 1}, batch {batch}: {what}", self.learning_rate_scale)

    def _check_outcome(self, epoch: int, averages: dict[str, float]) -> None:
        """Raise Diverged if what the epoch leaves is not finite: it is not to be saved."""
        x = batches.as_float(self.x[: self.config.batch_size])
        finite = all_finite(self.certifiable(), self.optimizer, x)
        spoiled = torch.tensor(int(not finite), device=self.world.device)
        if self.world.total(spoiled) or not all(map(math.isfinite, averages.values())):
            raise Diverged(
                f"epoch {epoch + 1}: a mean loss, a parameter, Adam's state or an output is not "
                "finite",
                self.learning_rate_scale,
            )

    def _estimate_statistics(self) -> None:
        """BatchNorm's statistics over the training images, for evaluation.

        As many as whole batches take, so that all processes have equal shares.
        """
        size = self.config.batch_size
        whole = self.x[: len(self.x) // size * size]
        chunks = torch.split(whole, size * max(1, CHUNK // size))
        shares = (batches.as_float(self.world.share(chunk)) for chunk in chunks)
        batch_norm.estimate(self.network, shares)
