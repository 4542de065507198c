"""torchrun in, DistributedDataParallel out."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from mogd.parallel import world_size
from robust_app.errors import UserError
from robust_app.precision import products_in

PATIENCE = timedelta(minutes=30)  # a download, for which the others wait, may take a while


class OfOneProcess(UserError):
    """What a process has found that the others need not find: each that has says so."""


class ProcessLost(OfOneProcess):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """The processes that train one network.

    Attributes:
        rank: of this process, in [0, size).
        size: number of processes.
        device: of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        """Whether this process computes on a GPU."""
        return self.device.type == "cuda"

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, every ``size``-th row: ``(batch / size, ...)``."""
        return batch[self.rank :: self.size]

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes."""
        if self.size == 1:
            return objective
        devices = [self.device] if self.on_gpu else None
        with warnings.catch_warnings():
            # The newest torch would have broadcast_buffers by a name that older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                objective,
                device_ids=devices,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # they are the same in all processes already
            )
        _order_gradients(wrapped)
        return wrapped

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.size > 1:
            torch.distributed.all_reduce(counts)
        return counts

    def agree_on(self, number: int) -> bool:
        """Whether all processes name the same number."""
        sums = self.total(torch.tensor([number, number**2], device=self.device)).tolist()
        return sums == [self.size * number, self.size * number**2]

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leading process passes alone, the others after it: one download, not many.

        Raises:
            UserError: in the others, for which this is the end: it failed in the leading one.
            OfOneProcess: it failed in another one: on its node, for instance, the data are missing.
        """
        failed = torch.zeros((), dtype=torch.int64, device=self.device)
        if not self.leads and self.total(failed):
            raise UserError("process 0 failed")
        try:
            yield
        except Exception as error:
            if self.leads:
                with suppress(RuntimeError):  # of another one that has gone: this is to be told
                    self.total(failed + 1).item()  # so that they have it before this one goes
            elif isinstance(error, UserError | OSError):
                raise OfOneProcess(f"process {self.rank}: {error}") from error
            raise
        if self.leads:
            self.total(failed)


def _order_gradients(objective: DistributedDataParallel) -> None:
    """Have the order in which gradients are sent settled before the first step.

    It is settled anew after the first backward pass: a resumed run would add the numbers of three
    processes in another order than an unbroken one.
    """
    objective(_zero).backward()
    for parameter in objective.parameters():
        parameter.grad = None


def _zero(network: nn.Module) -> Tensor:
    """A loss of all parameters that train."""
    sums = [parameter.sum() for parameter in network.parameters() if parameter.requires_grad]
    return 0 * torch.stack(sums).sum()


class _OfAllProcesses(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        value = value.contiguous()
        values = [torch.empty_like(value) for _ in range(world_size())]
        torch.distributed.all_gather(values, value)
        return torch.stack(values)

    @staticmethod
    @once_differentiable
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total[torch.distributed.get_rank()]


def of_all_processes(value: Tensor) -> Tensor:
    """The values of all processes, ``(processes, *value.shape)``, the same bits in each.

    Processes wait for each other in this: what a step has to say at one moment goes in one call.
    Differentiable: the gradient of a value is the sum of what all processes' losses have for it,
    so that what ``DistributedDataParallel`` averages is the gradient of their mean loss.

    Args:
        value: of one shape in all processes.
    """
    if world_size() == 1:
        return value.unsqueeze(0)
    values: Tensor = _OfAllProcesses.apply(value)
    return values


def rank() -> int:
    """Of this process among those that torchrun has started; 0 if it is alone."""
    return _number("RANK", 0)


def size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return _number("WORLD_SIZE", 1)


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that ended."""
    return _restarts() > 0


def _restarts() -> int:
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def will_restart() -> bool:
    """Whether torchrun has been told to do so."""
    return _number("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def _number(name: str, otherwise: int) -> int:
    """A variable that torchrun sets, or what holds where it is not set, or empty."""
    return int(os.environ.get(name) or otherwise)


@contextmanager
def join(device: str, patience: timedelta = PATIENCE) -> Iterator[World]:
    """The world that torchrun's environment describes; a process alone without it.

    Args:
        device: ``"auto"`` for a GPU where there is one, or a name that ``torch.device`` knows.
        patience: how long to wait for another process that lives but does not answer.

    Products of float32 are taken in float32 inside, which torch does not ask of cuDNN.

    Raises:
        UserError: if ``device`` names none.
        OfOneProcess: if this process has no such device.
        ProcessLost: if another process has ended or does not answer.
    """
    processes = size()
    chosen = _choose(device, _number("LOCAL_RANK", 0))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # also where streams and graphs are made
    with products_in("float32"):
        if processes == 1:
            yield World(0, 1, chosen)
            return
        try:
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            torch.distributed.init_process_group(
                backend, store=_store(patience), rank=rank(), world_size=processes, timeout=patience
            )
            yield World(rank(), processes, chosen)
        except RuntimeError as error:
            if not _of_another_process(error):
                raise
            raise ProcessLost(
                f"process {rank()} of {processes} cannot go on: another one has ended or does not "
                "answer"
            ) from error
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _store(patience: timedelta) -> Any:
    """Where processes find each other.

    On one node torchrun may keep it when it restarts them (``--standalone`` does): what those
    before have left in it, their addresses, is kept apart.
    """
    distributed: Any = torch.distributed  # it has all names only where it is available
    store, _, _ = next(rendezvous("env://", timeout=patience))
    of_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    name = f"attempt {_restarts()}" if of_one_node else "default_pg"  # which is torch's own
    return distributed.PrefixStore(name, store)


def _of_another_process(error: RuntimeError) -> bool:
    """Whether it is one of communication; gloo's have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _choose(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise OfOneProcess(f"--device: no GPU {index} here, {torch.cuda.device_count()} found")
        return torch.device("cuda", index)
    return device
