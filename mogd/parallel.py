"""One answer in all processes of a data-parallel run.

Gradients are averaged by ``DistributedDataParallel``; what else the weights see is averaged here.
"""

import torch
import torch.distributed
from torch import Tensor

UNAVERAGED = """\
the processes hold different gradients of losses[{index}] (norms {norms}), so its gradients were \
not averaged over the processes. Is the model wrapped in DistributedDataParallel? Then each loss \
needs a forward pass of its own through the wrapped module, followed by its own backward pass, \
before the next loss: give backward() a generator that yields the losses one by one. One forward \
pass for several losses, all forward passes before the backward passes, a loss computed through \
ddp.module, and no_sync() around the last micro-batch are not averaged. If every process is meant \
to train a model of its own, set optimizer.distributed = False."""

DISAGREEING = """\
the processes weighed the losses differently at the last step (weights {weights}), so their models \
are no longer the same. Either the priority answered from the data of its own process: average \
what it measures with mogd.parallel.average(...) before comparing. Or the optimizers were not the \
same before: made with other options, or a state was loaded in some processes alone."""


def world_size() -> int:
    """The number of processes of the default group; 1 where none was initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def average(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, the same bits in each; itself where there is one.

    Args:
        value: any shape, the same in each process.
    """
    if world_size() == 1:
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / world_size()


def agree_on_number(losses: int) -> None:
    """Check that all processes have as many losses.

    They tell each other by tensors on the CPU, for which no GPU is waited for; where their group
    has no backend for these (NCCL alone), nothing is checked.

    Raises:
        ValueError: in each process, if they have not.
    """
    if world_size() == 1 or "cpu:" not in torch.distributed.get_backend_config():
        return
    numbers = [torch.empty((), dtype=torch.int64, device="cpu") for _ in range(world_size())]
    torch.distributed.all_gather(numbers, torch.tensor(losses, device="cpu"))
    found = [int(number) for number in numbers]
    if len(set(found)) > 1:
        raise ValueError(f"losses must be as many in each process, got {found} by rank")


def agree(losses: Tensor, norms: Tensor, last_weights: Tensor, look: bool) -> Tensor:
    """The losses averaged over processes, after checking that these train one model.

    Args:
        losses: this process's losses, shape ``(K,)``.
        norms: the norms of its averaged gradients, shape ``(K,)``.
        last_weights: the weights it used last, shape ``(K,)``.
        look: whether to check, which on a GPU waits for the device.

    Raises:
        RuntimeError: if the norms differ by more than 0.1 %, or the weights at all.
    """
    here = torch.stack([losses, norms, last_weights])
    parts = [torch.empty_like(here) for _ in range(world_size())]
    torch.distributed.all_gather(parts, here)
    all_losses, all_norms, all_weights = torch.stack(parts, dim=1)
    if look:
        spread = all_norms.amax(0) - all_norms.amin(0)
        finite = all_norms.isfinite()
        differs = (spread > 1e-3 * all_norms.amax(0)) | (finite.any(0) & ~finite.all(0))
        if differs.any():
            index = int(differs.nonzero()[0])
            raise RuntimeError(UNAVERAGED.format(index=index, norms=all_norms[:, index].tolist()))
        first = all_weights[:1].expand_as(all_weights)
        if not torch.allclose(all_weights, first, rtol=0.0, atol=0.0, equal_nan=True):
            raise RuntimeError(DISAGREEING.format(weights=all_weights.tolist()))
    average_losses: Tensor = all_losses.mean(0)
    return average_losses
