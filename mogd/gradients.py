"""The gradient of each loss on its own, taken off the parameters' ``.grad``."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mogd.packs import Gradients
from mogd.shards import local, placed_as

SHARED_GRAPH = """\
losses[{index}] shares its graph with a loss before it, and the graph of an iterator's loss is \
freed before the next loss is made: make each loss from a forward pass of its own, or give \
backward() a list"""
FREED_GRAPH = """\
losses[{index}] has a graph that a backward pass before this one has freed: make the losses anew \
for each backward() of the optimizer, and call none of your own; a closure returns the losses or \
calls backward(), not both"""

COMPILED_GRAPH = """\
losses[{index}] has a graph that torch.compile made for one backward pass alone, and losses of a \
list may share theirs: give backward() an iterator that makes each loss by a forward pass of its \
own, or set torch._functorch.config.donated_buffer = False before the first one"""

AVERAGED_TWICE = """\
losses[{index}] has parameters that DistributedDataParallel has averaged for a loss before it: \
each loss needs a forward pass of its own through the wrapped module, then its own backward pass, \
before the next loss, so give backward() a generator that yields the losses one by one"""


@dataclass
class LossGradients:
    """The value and the gradient of each loss, summed over one or more backward passes."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    scaled: bool = False

    @torch.enable_grad()  # as torch's own backward, it may be called under no_grad
    def add(
        self, losses: Iterable[Tensor], parameters: Sequence[Tensor], scaler: GradScaler | None
    ) -> None:
        """Run one backward pass a loss; every parameter's ``.grad`` is None afterwards.

        Args:
            losses: scalar tensors; an iterator is asked for the next only after the graph of the
                one before is freed, anything else may share graph nodes among its losses.
            parameters: leaves whose gradients to take.
            scaler: multiplies each loss, hence the gradients, by its scale.

        Raises:
            TypeError: if ``losses`` is no iterable of real tensors.
            ValueError: if a loss is no scalar, has no graph, reaches none of the parameters or
                has a sparse gradient; if there are none, or not as many as at the first call, or
                ``scaler`` was given there and is not here, or the other way round.
            RuntimeError: if the graph of a loss was freed before, or compiled to be freed at once.
        """
        first = not self.losses
        if not first and self.scaled != (scaler is not None):
            before = "with" if self.scaled else "without"
            raise ValueError(f"scaler must be as in the micro-batch before, which was {before} one")
        self.scaled = scaler is not None
        index = 0
        for loss, retain_graph in each(losses):
            if first:
                self.losses.append(torch.zeros_like(loss, dtype=torch.float64, requires_grad=False))
                self.gradients.append({})
            elif index == len(self.losses):
                raise ValueError(f"losses must be {index} as in the micro-batch before, got more")
            for parameter in parameters:
                parameter.grad = self.gradients[index].get(parameter)
            scaled = loss if scaler is None else scaler.scale(loss)
            try:
                torch.autograd.backward(scaled, retain_graph=retain_graph)
            except RuntimeError as error:
                if "second time" in str(error):
                    reason = SHARED_GRAPH if index and isinstance(losses, Iterator) else FREED_GRAPH
                elif "donated buffers" in str(error):
                    reason = COMPILED_GRAPH
                elif index and "ready only once" in str(error):
                    reason = AVERAGED_TWICE
                else:
                    raise
                raise RuntimeError(reason.format(index=index)) from error
            self.losses[index] += loss.detach()
            self.gradients[index] = _take(parameters, index)
            index += 1
            del loss, scaled  # else they would outlive, with their graph, the making of the next
        if index == 0:
            raise ValueError("losses must hold at least one scalar tensor, got none")
        if index < len(self.losses):
            raise ValueError(
                f"losses must be {len(self.losses)} as in the micro-batch before, got {index}"
            )


def each(losses: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Every loss with whether a later one may need its graph; checked one by one."""
    if isinstance(losses, Tensor) and losses.dim() == 0:
        raise TypeError("losses must be an iterable of scalar tensors, got one 0-dim tensor")
    if isinstance(losses, Mapping):
        raise TypeError(
            f"losses must be scalar tensors, got a {type(losses).__name__}: give its values()"
        )
    if not isinstance(losses, Iterable):
        raise TypeError(
            f"losses must be an iterable of scalar tensors, got {type(losses).__name__}"
        )
    if isinstance(losses, set | frozenset):
        raise TypeError(f"losses must have an order, got a {type(losses).__name__}: give a list")
    shared = () if isinstance(losses, Iterator) else tuple(losses)
    index = 0
    for loss in shared or losses:
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses[{index}] must be a scalar tensor, got {type(loss).__name__}")
        if loss.is_complex():
            raise TypeError(f"losses[{index}] must be real, got {loss.dtype}")
        if loss.numel() != 1:
            raise ValueError(f"losses[{index}] must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{index}] has no graph to differentiate: it was detached, or computed "
                "under no_grad or inference_mode or from nothing that requires a gradient "
                "(to switch a loss off, multiply it by 0)"
            )
        index += 1  # noqa: SIM113 (enumerate would keep the loss before alive)
        yield loss.reshape(()), index < len(shared)
        del loss


def known_number(losses: Iterable[Tensor]) -> int | None:
    """How many losses there are, where that is known before they are made: not of an iterator."""
    if isinstance(losses, Iterator) or (isinstance(losses, Tensor) and losses.dim() == 0):
        return None
    return len(losses) if isinstance(losses, Sized) else None


def combine(loss_gradients: Sequence[Gradients], weights: Tensor) -> Gradients:
    """Σₖ wₖ gₖ by parameter, written over the gradients.

    Args:
        loss_gradients: one mapping a loss.
        weights: wₖ, shape ``(K,)``.
    """
    combined: Gradients = {}
    for gradients, weight in zip(loss_gradients, weights, strict=True):
        for alike in _alike(map(local, gradients.values())):
            # At least float32: rounded to float16, a weight may be infinite.
            dtype = torch.promote_types(alike[0].dtype.to_real(), torch.float32)
            for factor in _factors(weight, torch.finfo(dtype).max):
                torch._foreach_mul_(alike, factor.to(alike[0].device, dtype))
        again = [parameter for parameter in gradients if parameter in combined]
        if again:
            torch._foreach_add_(
                [local(combined[p]) for p in again], [local(gradients[p]) for p in again]
            )
        combined = gradients | combined
    return combined


def _factors(weight: Tensor, limit: float) -> Iterator[Tensor]:
    """On the CPU a weight as factors that are at most a limit; elsewhere, not asked, one, cut.

    One above float32's range is of a tiny gradient, or of one that is 0.
    """
    while weight.is_cpu and limit < weight.abs() < torch.inf:
        yield weight.clamp(-limit, limit)
        weight = weight.abs() / limit
    # An infinite one is for a GradScaler to see.
    yield torch.where(weight.isinf(), weight, weight.clamp(-limit, limit))


def _alike(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors of each device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return found.values()


def _take(parameters: Sequence[Tensor], index: int) -> Gradients:
    taken: Gradients = {}
    for position, parameter in enumerate(parameters):
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            continue
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"losses[{index}] gives parameter {position} of shape {tuple(parameter.shape)} "
                f"a gradient of layout {gradient.layout}; only dense gradients are supported "
                "(make the embedding with sparse=False)"
            )
        # A view belongs to another (a bucket of DistributedDataParallel): the next pass writes
        # over it. A lazy conjugate has no real and imaginary parts in memory to work on.
        owned = gradient.clone() if gradient._is_view() else gradient
        taken[parameter] = placed_as(parameter, owned.resolve_conj())
    if not taken:
        raise ValueError(f"losses[{index}] reaches none of the optimizer's parameters")
    return taken
