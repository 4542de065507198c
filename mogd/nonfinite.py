"""What happens to a step whose numbers are not finite."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


class Guard:
    """Keeps what is not finite from the moments and the parameters.

    Args:
        policy: ``"raise"`` or ``"skip"``.

    Raises:
        ValueError: if the policy is another.
    """

    def __init__(self, policy: Literal["raise", "skip"]) -> None:
        if policy not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', got {policy!r}")
        self.policy = policy
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")

    def admit(
        self, each: Tensor, norms: Tensor, slopes: Tensor, largest: float, scaled: bool
    ) -> tuple[Tensor, Tensor | bool]:
        """Whether the moments and the parameters may see this step.

        Args:
            each: whether each loss is :func:`sound`, shape ``(K,)``.
            norms: of their gradients, shape ``(K,)``.
            slopes: what the gradients will be multiplied by, shape ``(K,)``.
            largest: number that gradients and moments can hold; Σₖ |slopeₖ| ‖gₖ‖ must stay below.
            scaled: whether a GradScaler expects overflows, and deals with them.

        Returns:
            Whether each loss and its gradient is finite, shape ``(K,)``, for none where only the
            weighted sum is not; and whether all are: a bool, or, on a GPU, where looking would
            wait for the device, a 0-dim bool tensor.

        Raises:
            FloatingPointError: if they are not, under ``"raise"``; with a scaler only on the CPU,
                and where it is the rule's weights that are not finite, which no scale mends.
        """
        finite = each & (~each.all() | (slopes.abs() @ norms < largest))
        keep = finite.all()
        if self.skipped.device != keep.device:
            self.skipped = torch.full((), int(self.skipped), device=keep.device)
        if keep.is_cuda and (self.policy == "skip" or scaled):
            self.skipped += ~keep
            return finite, keep
        if keep:
            return finite, True
        overflow = scaled and not (each.all() and not slopes.isfinite().all())
        if self.policy == "raise" and not overflow:
            raise FloatingPointError(_describe(each, slopes))
        self.skipped += 1
        return finite, False


def sound(losses: Tensor, norms: Tensor, largest: float) -> Tensor:
    """Whether each loss and its gradient is finite, shape ``(K,)``.

    Args:
        losses: shape ``(K,)``.
        norms: of their gradients, shape ``(K,)``.
        largest: number that gradients and moments can hold; ‖gₖ‖ must stay below half of it, for
            what a moment moves by is a difference of two.
    """
    return losses.isfinite() & (norms < largest / 2)


def largest_number(parameters: Iterable[Tensor]) -> float:
    """The largest number that the parameters' gradients and moments can hold.

    Moments are float32 at least. float16's own range is not looked at: a norm over many parameters
    may exceed 65504 where no entry does.
    """
    dtypes = {parameter.dtype for parameter in parameters}
    return min(torch.finfo(torch.promote_types(dtype, torch.float32)).max for dtype in dtypes)


def _describe(sound: Tensor, slopes: Tensor) -> str:
    names = [f"losses[{index}]" for index in (~sound).nonzero().flatten().tolist()]
    if names:
        return f"not finite: {' and '.join(names)}, or the gradient of it"
    return f"not finite: the sum of the gradients, weighed by {slopes.tolist()}"
