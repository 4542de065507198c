"""The training loop (paper, Algorithm 2)."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mogd import Threshold, UnbiasedMultiGradient, parallel
from robust_app import (
    batch_norm,
    batches,
    data,
    method_settings,
    methods,
    precision,
    training_state,
)
from robust_app.compilation import CompiledLosses
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.divergence import Diverged, FirstFault, all_finite, described
from robust_app.epochs import held_out_errors, training_batches
from robust_app.errors import SettingError
from robust_app.evaluation import CHUNK
from robust_app.execution import Eager, Report, Values
from robust_app.folding import fold
from robust_app.fosc import Stationarity
from robust_app.layerwise import split
from robust_app.learning_rates import parameter_groups
from robust_app.losses import Objective
from robust_app.networks import build_network
from robust_app.schedules import Phase, Setting, setting
from robust_app.steps import Batch, Losses
from robust_app.watching import Means, Watcher


class Trainer:
    """A network, its optimizer and its data, trained one epoch at a time.

    Args:
        config: the run; the same config gives the same bits on the same machine.
        dataset: what to train on; the test part is not touched.
        world: the processes that share the work.
        execution: how steps are run; one of :data:`robust_app.capture.EXECUTIONS`. It changes
            what the run computes by rounding alone.

    Attributes:
        network: all layers, also those that a layer-wise stage has frozen.
        stage: 0 while all of them train, s in the s-th layer-wise stage.
        learning_rate_scale: multiplies the learning rate that the schedule says.

    Raises:
        UserError: if a name is unknown, the method does not fit the configuration, the data do
            not fit the model or the batch size, or the device does not fit the precision or the
            execution.
    """

    def __init__(
        self, config: Config, dataset: Dataset, world: World, execution: type[Eager] = Eager
    ) -> None:
        method_settings.check(config)
        precision.check(config.precision, world.device)
        execution.check(world)
        if config.batch_size % world.size:
            raise SettingError(
                "batch_size",
                f"expected a multiple of the {world.size} processes, found {config.batch_size}",
            )
        if config.batch_norm and config.batch_size < 2:
            raise SettingError("batch_size", "expected at least 2 with batch_norm, found 1")
        largest = max(dataset.image_shape[1:])
        if config.augment and config.crop_padding > largest:  # more would leave nothing to see
            raise SettingError(
                "crop_padding",
                f"expected at most {largest} for images of {largest} pixels, "
                f"found {config.crop_padding}",
            )
        self.config, self.world, self.execution = config, world, execution
        self.dataset = dataset
        self.method = methods.find(config.method)
        parts = data.split(dataset, config.held_out, config.seed)
        self.x, self.labels, self.held_out_x, self.held_out_labels = (
            part.to(world.device) for part in parts
        )
        if len(self.x) < config.batch_size:
            raise SettingError(
                "batch_size",
                f"expected at most the {len(self.x)} training images, found {config.batch_size}",
            )
        self._initialize()
        split(self.network, config.stages)  # refuses a stage beyond the last layer now
        self.stationarity = Stationarity()
        self.priority = Threshold(self.stationarity, limit=config.fosc_maximum)
        self.epochs_done = 0
        self.learning_rate_scale = 1.0
        self.faults = FirstFault(2, world.device)
        self.begin_stage(0)

    def _initialize(self) -> None:
        """The network as training begins."""
        torch.manual_seed(self.config.seed)
        network = build_network(self.config, self.dataset, trainable=True)
        self.network = network.to(self.world.device)

    def begin_stage(self, stage: int) -> None:
        """Freeze the layers before the stage's input; a fresh optimizer for the rest (A.6).

        BatchNorm is folded away before the first layer-wise stage.
        """
        if stage > 0:
            self.network = fold(self.network)
        self.stage = stage
        before, trained = split(self.network, stage)
        self.frozen = before.requires_grad_(False).eval()
        with torch.no_grad():
            self.input_shape = self.frozen(batches.as_float(self.x[:1])).shape[1:]
        make_losses = CompiledLosses if self.execution.compiles else Losses
        objective = self.world.wrap(Objective(trained))
        self.losses = make_losses(
            precision.of_losses(objective, self.config.precision, self.world.device),
            trained,
            self.method,
            self.method.attack(self.config),
            self.stationarity,
        )
        rule = self.method.rule or methods.constant_weights
        self.optimizer = UnbiasedMultiGradient(
            parameter_groups(trained, self.config.reference_fan_in if stage == 0 else 0.0),
            torch.optim.Adam,
            lr=self.config.learning_rate,
            moment_decay=self.config.moment_decay,
            rule=rule(self.config),
            priority=self.priority,
            nonfinite="skip",  # what was skipped is looked for here
            weigh_by=[next(trained.parameters())] if self.config.authors_weights else None,
            # The implementation that does not wait for the device.
            fused=self._on_gpu,
            capturable=self._on_gpu and self.execution.captures,
        )
        self.run_step = self.execution(self._step, self.world.device)

    @property
    def _on_gpu(self) -> bool:
        return self.world.device.type == "cuda"

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
        if now.stage != self.stage:
            self.begin_stage(now.stage)
        self.faults.forget()
        self.losses.network.train()
        drawn = training_batches(
            self.x, self.labels, self.input_shape, self.config, epoch, self.world
        )
        for number, (x, labels, start) in enumerate(drawn):
            now = self._setting(epoch + number / steps)
            batch_norm.freeze_first(self.network, now.first_batch_norm_frozen)
            with precision.products_in(self.config.precision):
                report = self.run_step(now, x, labels, start)
            if not self._on_gpu:  # to look there would be to wait
                self._check_steps(epoch, steps)
            means.add(report)
            watcher.batch(epoch, number + 1, steps, now, Means() if self._on_gpu else means)
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
        found = self.faults.found()
        if found is not None:
            batch, indices = found
            phase = setting(self.config, epoch + (batch - 1) / steps).phase
            names = methods.losses_of(self.method, phase)
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

    def _step(
        self, phase: Phase, values: Values, x: Tensor, labels: Tensor, start: Tensor
    ) -> Report:
        """One step of training; see :class:`robust_app.execution.Step`."""
        if self.stage == 0:
            batch = Batch.of_images(x, labels, start, values.epsilon)
        else:
            batch = Batch.of_hidden(self.frozen, x, labels, start, values.epsilon)
        for group in self.optimizer.param_groups:
            group["lr"] = values.learning_rate * group["multiplier"]
        self.priority.limit = values.fosc_threshold
        names = methods.losses_of(self.method, phase)
        losses = self.losses.of(names, batch, values)
        self.optimizer.zero_grad()
        if len(names) == 1:
            report = self._single_backward(names[0], next(losses))
        else:
            report = self._joint_backward(names, losses)
        if self.config.gradient_clip < math.inf:
            nn.utils.clip_grad_norm_(self.losses.network.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return report

    def _single_backward(self, name: str, loss: Tensor) -> Report:
        """One loss as it is."""
        # The gradients are averaged over the processes. So that none goes on alone, that of a loss
        # that is not finite is made so too.
        torch.autograd.backward(loss, torch.where(loss.isfinite(), 1.0, torch.nan))
        gradients = [p.grad for p in self.losses.network.parameters() if p.grad is not None]
        ends = torch.stack([end for gradient in gradients for end in gradient.aminmax()])
        self.faults.note(ends.isfinite().all()[None])  # a sum of squares could overflow
        return {f"{name}_loss": loss.detach()}

    def _joint_backward(self, names: tuple[str, ...], losses: Iterator[Tensor]) -> Report:
        """Both losses, weighed by their past."""
        record = self.optimizer.backward(losses)
        assert record is not None  # only None while accumulating
        self.faults.note(record.finite)
        report = {}
        for index, name in enumerate(names):
            report[f"{name}_loss"] = record.losses[index]
            report[f"{name}_weight"] = record.weights[index]
        report["cosine"] = record.cosines[0, 1]
        report["conflicts"] = record.conflict
        report["certified_first"] = record.conflict & (record.prioritized == 1)
        return report

    def _estimate_statistics(self) -> None:
        """BatchNorm's statistics over the training images, for evaluation.

        As many as whole batches take, so that all processes have equal shares.
        """
        size = self.config.batch_size
        whole = self.x[: len(self.x) // size * size]
        chunks = torch.split(whole, size * max(1, CHUNK // size))
        shares = (batches.as_float(self.world.share(chunk)) for chunk in chunks)
        batch_norm.estimate(self.network, shares)
