"""Numbers that explode: where they did first, and what a run does about it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robust_app.errors import UserError

STOP, LOWER = "stop", "lower-lr"
CHOICES = (STOP, LOWER)
"""What a run does that diverges: end, or go back to its last checkpoint at a lower rate."""

FACTOR = 0.5  # on the learning rate, each time
LEAST = FACTOR**5  # the scale of the learning rate below which nothing is tried any more


class Diverged(UserError):
    """A loss, a gradient or what came of them is not finite.

    Args:
        where: the epoch, the batch and the loss, as far as they are known.
        scale: what the learning rate was multiplied by, 1 unless the run had diverged before.
    """

    def __init__(self, where: str, scale: float = 1.0) -> None:
        before, advice = "", f", or --on-divergence {LOWER}"
        if scale != 1:  # which is what was tried
            before, advice = f" at {scale:g} of the learning rate", ""
        super().__init__(
            f"training diverged in {where}{before}; the checkpoint before it is whole "
            f"(try a lower learning_rate in a new run{advice})"
        )
        self.where = where


class FirstFault:
    """The first step of an epoch whose losses or gradients were not finite.

    It is noted on the device, without waiting for it, by operations that a CUDA graph can hold.

    Args:
        losses: the most that a step has.
        device: of the losses.
    """

    def __init__(self, losses: int, device: torch.device) -> None:
        self._steps, self._first = torch.zeros((2, 1), dtype=torch.int64, device=device)
        self._faulty = torch.zeros(losses, dtype=torch.bool, device=device)

    def forget(self) -> None:
        """Begin an epoch."""
        for tensor in (self._steps, self._first, self._faulty):
            tensor.zero_()

    def note(self, finite: Tensor) -> None:
        """Count a step.

        Args:
            finite: whether each of its losses and their gradients is, ``(K,)``.
        """
        self._steps += 1
        now = (self._first == 0) & ~finite.all()
        self._first += now * self._steps
        self._faulty[: len(finite)] |= now & ~finite

    def found(self) -> tuple[int, list[int]] | None:
        """The number of that step, from 1, and which of its losses; None if all were finite.

        Waits for the device.
        """
        first = int(self._first)
        return (first, self._faulty.nonzero().flatten().tolist()) if first else None


@torch.no_grad()
def all_finite(network: nn.Module, optimizer: Optimizer, x: Tensor) -> bool:
    """Whether what an epoch leaves is finite: parameters, the optimizer's state, and outputs.

    Parameters may be finite and yet too large for any output to be.

    Args:
        network: in evaluation mode.
        optimizer: of the parameters that train.
        x: images in [0, 1].
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [
        value
        for of_parameter in optimizer.state.values()
        for value in of_parameter.values()
        if isinstance(value, Tensor)
    ]
    tensors = (*trained, *state, *network.parameters(), network(x))
    return bool(torch.stack([tensor.isfinite().all().to(x.device) for tensor in tensors]).all())


def described(losses: Sequence[str]) -> str:
    """What is wrong with the losses of these names.

    >>> described(["certified"])
    'the certified loss or its gradient is not finite'
    >>> described(["adversarial", "certified"])
    'the adversarial and certified losses or their gradients are not finite'
    """
    if len(losses) == 1:
        return f"the {losses[0]} loss or its gradient is not finite"
    return f"the {' and '.join(losses)} losses or their gradients are not finite"
