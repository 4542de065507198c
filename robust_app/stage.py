"""One stage of training: what trains in it, and a step of it (paper, Algorithm 2)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mogd import Threshold, UnbiasedMultiGradient
from robust_app import methods, precision
from robust_app.compilation import CompiledLosses
from robust_app.config import Config
from robust_app.distributed import World
from robust_app.divergence import FirstFault
from robust_app.execution import Eager, Report, Values
from robust_app.fosc import Stationarity
from robust_app.layerwise import split
from robust_app.learning_rates import parameter_groups
from robust_app.losses import Objective
from robust_app.schedules import Phase
from robust_app.steps import Batch, Losses


class Stage:
    """The layers that train, their losses and a fresh optimizer for them.

    Args:
        number: 0 while all layers train, s in the s-th layer-wise stage (A.6).
        network: all layers; those before the stage's input are frozen.
        config: of the run.
        world: the processes that share each batch.
        execution: what will run the steps.

    Attributes:
        number: as given.
        method: of the run.
        frozen: the layers before the stage's input.
        losses: what makes the losses of a step; it holds the layers that train.
        optimizer: of these layers.
        faults: the steps of an epoch that were not finite.

    Raises:
        SettingError: no layer is left to train.
    """

    def __init__(
        self,
        number: int,
        network: nn.Module,
        config: Config,
        world: World,
        execution: type[Eager],
    ) -> None:
        self.number = number
        before, trained = split(network, number)
        self.frozen = before.requires_grad_(False).eval()
        self.method = methods.find(config.method)
        self._gradient_clip = config.gradient_clip
        self.faults = FirstFault(2, world.device)
        stationarity = Stationarity()
        self._priority = Threshold(stationarity, limit=config.fosc_maximum)
        make_losses = CompiledLosses if execution.compiles else Losses
        objective = world.wrap(Objective(trained))
        self.losses = make_losses(
            precision.of_losses(objective, config.precision, world.device),
            trained,
            self.method,
            self.method.attack(config),
            stationarity,
        )
        rule = self.method.rule or methods.constant_weights
        self.optimizer = UnbiasedMultiGradient(
            parameter_groups(trained, config.reference_fan_in if number == 0 else 0.0),
            torch.optim.Adam,
            lr=config.learning_rate,
            moment_decay=config.moment_decay,
            rule=rule(config),
            priority=self._priority,
            nonfinite="skip",  # what was skipped is looked for here
            weigh_by=[next(trained.parameters())] if config.authors_weights else None,
            # The implementation that does not wait for the device.
            fused=world.on_gpu,
            capturable=world.on_gpu and execution.captures,
        )

    def step(
        self, phase: Phase, values: Values, x: Tensor, labels: Tensor, start: Tensor
    ) -> Report:
        """One step of training; see :class:`robust_app.execution.Step`."""
        if self.number == 0:
            batch = Batch.of_images(x, labels, start, values.epsilon)
        else:
            batch = Batch.of_hidden(self.frozen, x, labels, start, values.epsilon)
        for group in self.optimizer.param_groups:
            group["lr"] = values.learning_rate * group["multiplier"]
        self._priority.limit = values.fosc_threshold
        names = methods.losses_of(self.method, phase)
        losses = self.losses.of(names, batch, values)
        self.optimizer.zero_grad()
        if len(names) == 1:
            report = self._single_backward(names[0], next(losses))
        else:
            report = self._joint_backward(names, losses)
        if self._gradient_clip < math.inf:
            nn.utils.clip_grad_norm_(self.losses.network.parameters(), self._gradient_clip)
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
