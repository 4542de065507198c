"""Tensors worked on as few long vectors: an operation on a small tensor costs as much as its call.

Large tensors are worked on in blocks, which bounds the memory of their copies in float64. Of a
tensor that several processes share, this is about the entries that are here.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from mogd.shards import Holders, Sum, holders, local

Gradients = dict[Tensor, Tensor]
"""The gradient of one loss by parameter; a parameter that is absent has a zero gradient."""

# Elements cast to float64 at a time:
BLOCK = 1 << 17  # what stays in a processor's cache
GPU_BLOCK = 1 << 22  # few launches


def block_size(tensor: Tensor) -> int:
    """How many entries of a tensor to cast to float64 at a time."""
    return BLOCK if tensor.is_cpu else GPU_BLOCK


def groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors to join to one vector: small ones of a kind up to a block, large ones alone.

    Of a kind are those of one dtype and device that the same processes hold.
    """
    made: list[list[Tensor]] = []
    unfilled: dict[tuple[torch.device, torch.dtype, Holders], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        key = (tensor.device, tensor.dtype, holders(tensor))
        size, largest = local(tensor).numel(), block_size(tensor)
        group, filled = unfilled.get(key, ([], 0))
        if filled + size > largest:
            group, filled = [], 0
        if not group:
            made.append(group)
        group.append(tensor)
        if size <= largest:
            unfilled[key] = group, filled + size
    return made


def blocks(group: Sequence[Tensor]) -> Iterator[Tensor]:
    """The entries of a group as real vectors of at most a block; what is large is not copied."""
    yield from torch.split(joined(group), block_size(group[0]))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The entries of all tensors as one real vector; of a single contiguous one, a view."""
    reals = [_real(local(tensor)) for tensor in tensors]
    vector: Tensor = _flatten_dense_tensors(reals)  # type: ignore[no-untyped-call]
    return vector


class Doubles:
    """Casts blocks to float64, one at a time: each in the memory of the one before.

    Memory taken afresh for each block would cost more than the arithmetic, for it is not in cache.
    """

    def __init__(self) -> None:
        self._memory: dict[torch.device, Tensor] = {}

    def __call__(self, block: Tensor) -> Tensor:
        """The block in float64, until the next call."""
        if block.dtype is torch.float64:
            return block
        memory = self._memory.get(block.device)
        if memory is None or memory.numel() < block.numel():
            memory = torch.empty(block.numel(), dtype=torch.float64, device=block.device)
            self._memory[block.device] = memory
        return memory[: block.numel()].view(block.shape).copy_(block)


def norm(gradients: Gradients, device: torch.device) -> Tensor:
    """‖g‖₂ over all parameters, accumulated in float64: 0-dim, not finite if any entry is not."""
    square = Sum((), device)
    doubles = Doubles()
    for group in groups(gradients.values()):
        part = square.part(group[0])
        for block in blocks(group):
            double = doubles(block)
            part += (double @ double).to(device)
    return square.total().sqrt()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
