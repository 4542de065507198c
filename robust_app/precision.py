"""What floating-point format the products of a training step are taken in.

Parameters, moments, Adam, FOSC, cross entropies and all that measures or certifies are float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robust_app.errors import UserError

PRECISIONS = ("float32", "tf32", "bf16")

Objective = Callable[[Callable[[nn.Module], Tensor]], Tensor]


def check(precision: str, device: torch.device) -> None:
    """See that a device has a format.

    Raises:
        UserError: for ``tf32`` without a GPU.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision: tf32 needs a GPU, found {device.type}")


@contextmanager
def of_step(precision: str) -> Iterator[None]:
    """Around a whole step: with ``tf32`` its products on a GPU round their factors to 10 bits."""
    if precision != "tf32":
        yield
        return
    _products_in("tf32")
    try:
        yield
    finally:
        float32_products()


def float32_products() -> None:
    """Take products of float32 in float32 on a GPU too: TF32 is wrong in the third digit."""
    _products_in("ieee")


def of_losses(objective: Objective, precision: str, device: torch.device) -> Objective:
    """With ``bf16`` the objective under autocast, else the objective itself."""
    if precision != "bf16":
        return objective

    def rounded(loss: Callable[[nn.Module], Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(loss)

    return rounded


@contextmanager
def without_autocast(*values: Tensor) -> Iterator[list[Tensor]]:
    """For sums of many numbers: inside, autocast is off and what it had rounded is float32 again.

    Args:
        values: on one device.

    Yields:
        The values; as they are where autocast is off anyway.
    """
    kind = values[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        yield list(values)
        return
    with torch.autocast(kind, enabled=False):
        yield [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]


def memory_format(precision: str, device: torch.device) -> torch.memory_format:
    """What convolutions are fastest with: tensor cores want the channels last."""
    if device.type == "cuda" and precision != "float32":
        return torch.channels_last
    return torch.contiguous_format


def _products_in(precision: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = precision
