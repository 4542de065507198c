"""What floating-point format the products of a training step are taken in.

Parameters, moments, Adam, FOSC, cross entropies and all that measures or certifies are float32, and
with ``bf16`` the products of the first of the layers that train too, where there are several.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robust_app.errors import SettingError
from robust_app.layer_rules import flattened, is_plainly

PRECISIONS = ("float32", "tf32", "bf16")

Evaluate = Callable[[Callable[[nn.Module], Tensor]], Tensor]
"""Of a loss of the network, as a :class:`robust_app.losses.Objective` does."""


def check(precision: str, device: torch.device) -> None:
    """See that a device has a format.

    Raises:
        SettingError: for ``tf32`` without a GPU.
    """
    if precision == "tf32" and device.type != "cuda":
        raise SettingError("precision", f"tf32 needs a GPU, found {device.type}")


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """How products of float32 are taken inside: on a GPU in TF32 for ``tf32``, else in float32.

    TF32 rounds factors to 10 bits; torch lets cuDNN use it unless told otherwise, and by
    ``torch.set_float32_matmul_precision`` processors take bf16, of 7 bits, where they have it.
    """
    backends: Any = torch.backends
    on_gpu = (backends.cudnn.conv, backends.cuda.matmul)
    kinds = (*on_gpu, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "tf32" if precision == "tf32" and kind in on_gpu else "ieee"
    try:
        # NNPACK, where oneDNN is not, has convolutions that round more than sums of products do.
        with backends.nnpack.flags(enabled=False):
            yield
    finally:
        for kind, setting in zip(kinds, before, strict=True):
            kind.fp32_precision = setting


@contextmanager
def plain_float32() -> Iterator[None]:
    """Inside, products are float32's and autocast is off, whatever is asked for outside."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
    with ExitStack() as stack:
        stack.enter_context(products_in("float32"))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def of_losses(objective: Evaluate, precision: str, device: torch.device) -> Evaluate:
    """With ``bf16`` the objective under autocast, its first layer not, else the objective itself.

    The first layer of a network that is certified in a large ball has a threshold, for which
    :func:`~robust_app.batch_norm.freeze_first` keeps its statistics. bf16 rounds it, and the ends
    of the boxes, by up to 0.4 %. Of networks near it the loss that trains then does not see which
    pixels cross it, or sees some that do not (docs/results/what-we-tried.md).
    """
    if precision != "bf16":
        return objective

    def rounded(loss: Callable[[nn.Module], Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(lambda network: loss(first_in_float32(network)))

    return rounded


class InFloat32(nn.Module):
    """A layer that autocast leaves alone.

    Args:
        layer: any.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of ``x``, in float32 at least."""
        with without_autocast(x) as (x,):
            output: Tensor = self.layer(x)
        return output


def first_in_float32(network: nn.Module) -> nn.Module:
    """The network with its first layer that has a matrix :class:`InFloat32`, whatever it is.

    Args:
        network: layers in a row, nested or not, or anything else, which is returned as it is. So
            are layers of which one alone has a matrix: margins are merged with a last Linear layer,
            without autocast, and would be looser if it were within another.

    >>> first_in_float32(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)))
    Sequential(
      (0): InFloat32(
        (layer): Linear(in_features=1, out_features=1, bias=True)
      )
      (1): ReLU()
      (2): Linear(in_features=1, out_features=1, bias=True)
    )
    """
    if not is_plainly(network, nn.Sequential):
        return network
    layers = flattened(network)
    with_matrix = [layer for layer in layers if any(p.ndim > 1 for p in layer.parameters())]
    if len(with_matrix) < 2:
        return network
    first = with_matrix[0]
    return nn.Sequential(*(InFloat32(layer) if layer is first else layer for layer in layers))


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
        yield list(map(at_least_float32, values))


def at_least_float32(x: Tensor) -> Tensor:
    """Halves as float32, anything wider as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
