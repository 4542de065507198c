"""Which loss goes first when two disagree (paper, Algorithm 1, line 16).

A priority is any callable from the losses of a step, shape ``(K,)``, to the index of the one to
favour: an int or a 0-dim integer tensor. It is asked after the gradients exist and before the
weights do, so it may read the ``.grad`` of inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor


class Priority(Protocol):
    """The oracle of a conflict."""

    def __call__(self, losses: Tensor, /) -> int | Tensor:
        """The index of the loss to favour, given the detached losses, shape ``(K,)``."""


@dataclass(frozen=True)
class Fixed:
    """Always favours the same loss.

    Args:
        index: position of the loss, at least 0.

    Raises:
        ValueError: if ``index`` is not an integer of at least 0.

    >>> Fixed(1)(torch.tensor([3.0, 4.0]))
    1
    """

    index: int

    def __post_init__(self) -> None:
        if isinstance(self.index, bool) or not isinstance(self.index, Integral) or self.index < 0:
            raise ValueError(f"index must be an integer of at least 0, got {self.index!r}")

    def __call__(self, losses: Tensor) -> int:
        return self.index


@dataclass
class Threshold:
    """Favours the first loss while a measured quantity is at most ``limit``, else the second.

    The paper's oracle: ``measure`` is the first-order stationary condition c(x_adv) of the
    adversarial examples, ``limit`` the decreasing c_t. ``limit`` may be set at any time.

    Args:
        measure: function of the losses, shape ``(K,)``, that returns a 0-dim tensor.
        limit: the largest value at which the first loss goes first; a number or a 0-dim tensor.

    Raises:
        TypeError: if ``measure`` cannot be called or ``limit`` is neither, on use too; on use, if
            ``measure`` returns no 0-dim tensor.
        ValueError: if ``limit`` is the number NaN, on use too.

    >>> gap = Threshold(lambda losses: losses[1] - losses[0], limit=0.5)
    >>> gap(torch.tensor([1.0, 1.2])), gap(torch.tensor([1.0, 2.0]))
    (tensor(0), tensor(1))
    """

    measure: Callable[[Tensor], Tensor]
    limit: float | Tensor

    def __post_init__(self) -> None:
        if not callable(self.measure):
            raise TypeError(f"measure must be callable, got {self.measure!r}")
        _check_limit(self.limit)

    def __call__(self, losses: Tensor) -> Tensor:
        measured = self.measure(losses)
        if not isinstance(measured, Tensor) or measured.dim() != 0:
            raise TypeError(f"measure must return a 0-dim tensor, got {measured!r}")
        _check_limit(self.limit)  # it may have been set since
        return (~(measured <= self.limit)).long()  # NaN is at most nothing


def _check_limit(limit: object) -> None:
    scalar = isinstance(limit, Tensor) and limit.dim() == 0
    if not scalar and (isinstance(limit, bool) or not isinstance(limit, Real)):
        raise TypeError(f"limit must be a number or a 0-dim tensor, got {limit!r}")
    if isinstance(limit, Real) and not limit <= math.inf:
        raise ValueError("limit must be a number to compare with, got nan")


def ask(priority: Priority, losses: Tensor, sound: Tensor) -> Tensor:
    """The answer of a priority as a checked 0-dim integer tensor.

    Args:
        priority: the oracle.
        losses: detached losses, shape ``(K,)``.
        sound: whether each loss and its gradient is finite, shape ``(K,)``. On the CPU, where
            looking costs nothing, nobody is asked about others: the answer is 0.

    Raises:
        TypeError: if the answer is neither an int nor a 0-dim integer tensor.
        ValueError: if it is not an index of the losses; not looked at on a GPU, where that would
            wait for the device.
    """
    if sound.is_cpu and not sound.all():
        return torch.zeros((), dtype=torch.int64, device=losses.device)
    answer = priority(losses.clone())  # it may work in place
    if isinstance(answer, bool) or not isinstance(answer, Integral | Tensor):
        raise TypeError(f"priority must return an int or a 0-dim integer tensor, got {answer!r}")
    if isinstance(answer, Tensor):
        fractional = answer.is_floating_point() or answer.is_complex()
        if answer.dim() != 0 or fractional or answer.dtype is torch.bool:
            raise TypeError(
                "priority must return an int or a 0-dim integer tensor, "
                f"got {answer.dtype} of shape {tuple(answer.shape)}"
            )
        if answer.is_cuda:
            return answer
    if not 0 <= int(answer) < losses.numel():
        raise ValueError(
            f"priority must return an index of {losses.numel()} losses, got {int(answer)}"
        )
    return torch.full((), int(answer), device=losses.device)
