"""How the steps of an epoch are run: as they are, or with their losses compiled.

A third way is in :mod:`robust_app.capture`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.schedules import Phase, Setting

Report = dict[str, Tensor]
"""What a step tells, 0-dim tensors by name."""


@dataclass(frozen=True, kw_only=True)
class Values:
    """The numbers of a :class:`~robust_app.schedules.Setting`, for a step to compute with.

    Each is a number or a 0-dim float32 tensor on the device; ε is always a tensor.
    """

    epsilon: Tensor
    fosc_threshold: float | Tensor
    learning_rate: float | Tensor
    natural_weight: float | Tensor
    crown_share: float | Tensor
    box_regularizers: float | Tensor

    @classmethod
    def of(cls, now: Setting, device: torch.device) -> "Values":
        """ε as a tensor, the others as the numbers they are."""
        numbers = {field.name: getattr(now, field.name) for field in fields(cls)}
        return cls(**(numbers | {"epsilon": torch.full((), now.epsilon, device=device)}))

    @classmethod
    def tensors(cls, now: Setting, device: torch.device) -> "Values":
        """All as tensors, but for what is all or nothing: parts of the losses are left out then."""
        numbers = {field.name: getattr(now, field.name) for field in fields(cls)}
        changing = {
            name: torch.full((), number, device=device)
            for name, number in numbers.items()
            if name not in all_or_nothing(now)
        }
        return cls(**(numbers | changing))

    def fill(self, now: Setting) -> None:
        """Set the tensors to the numbers of another moment, without waiting for the device."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value.fill_(getattr(now, field.name))


def all_or_nothing(now: Setting) -> Mapping[str, float]:
    """The weights of parts of the losses that are 0, and κ where it is 1.

    They decide which operations a step consists of; all other numbers only what these compute.
    """
    shares = ("natural_weight", "crown_share", "box_regularizers")
    ends = {name: getattr(now, name) for name in shares}
    return {
        name: share
        for name, share in ends.items()
        if share == 0 or (name == "natural_weight" and share == 1)
    }


class Step(Protocol):
    """A step of training from its data to the parameters after it."""

    def __call__(
        self, phase: Phase, values: Values, x: Tensor, labels: Tensor, start: Tensor, /
    ) -> Report: ...


class Eager:
    """Runs each step as it is.

    Args:
        step: of one stage of training.
        device: where it computes.
    """

    name = "eager"
    captures = False  # the optimizer's state must then be fit for it
    compiles = False  # the losses

    def __init__(self, step: Step, device: torch.device) -> None:
        self.step, self.device = step, device

    @classmethod
    def check(cls, world: World) -> None:
        """Raise UserError if steps cannot be run in this way there."""

    def __call__(self, now: Setting, x: Tensor, labels: Tensor, start: Tensor) -> Report:
        """Train on images with their labels and random starts; see :class:`Step`."""
        return self.step(now.phase, Values.of(now, self.device), x, labels, start)


class Compiled(Eager):
    """Runs each step with its losses compiled; numbers are tensors, for no other compiles them."""

    name = "compile"
    compiles = True

    @classmethod
    def check(cls, world: World) -> None:
        """Refuse several processes: what they say to each other cannot be compiled here."""
        if world.size > 1:
            raise UserError("--execution: compile is for one process, use eager with torchrun")

    def __call__(self, now: Setting, x: Tensor, labels: Tensor, start: Tensor) -> Report:
        return self.step(now.phase, Values.tensors(now, self.device), x, labels, start)
