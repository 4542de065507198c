"""Base optimizers that evaluate the losses several times a step (L-BFGS)."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mogd.gradients import each
from mogd.record import Record
from mogd.rules import Weighting, slopes

MICRO_BATCHES = """\
{base} evaluates the losses several times a step: its closure must return those of the whole \
batch, and gather no micro-batches"""


@functools.cache
def needs_closure(step: Callable[..., Any]) -> bool:
    """Whether an optimizer's ``step`` cannot be called without a closure."""
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def reevaluation(
    base: Optimizer,
    closure: Callable[[], Any] | None,
    record: Record | None,
    average: Callable[[Tensor], Tensor],
) -> Callable[[], float] | None:
    """What a base that needs a closure gets, None for others.

    Raises:
        TypeError: if it needs one, and there is none that returned losses.
    """
    if not needs_closure(type(base).step):
        return None
    if closure is None or record is None:
        raise TypeError(
            f"{type(base).__name__} evaluates the losses several times a step: "
            "call step(closure) with a closure that returns them"
        )
    return _objective(base, closure, record, average)


def _objective(
    base: Optimizer,
    closure: Callable[[], Any],
    record: Record,
    average: Callable[[Tensor], Tensor],
) -> Callable[[], float]:
    """One objective for the whole step: Σₖ κₖ Lₖ + κ_reg,ₖ Lₖ² with the weights of the record.

    Its first call finds value and gradient in place, left by the ``backward`` of the record,
    unless the base has moved the parameters or replaced their gradients before; what it writes
    through ``.data`` is not seen, and a gradient that a hook has clipped in place is taken so.
    ``average`` takes a loss of this process to that of all, so that all take the same decisions.
    """
    expected = len(record.weights)
    left: list[tuple[Tensor | None, int]] | None = _tensors(base)

    def value(losses: Tensor) -> Tensor:
        return (record.weights * losses + record.regularization * losses**2).sum()

    def objective() -> float:
        nonlocal left
        before, left = left, None  # the first gradients are not kept alive
        if before is not None and _same(before, _tensors(base)):
            return float(value(record.losses))
        del before
        losses: list[Tensor] = []
        with torch.enable_grad():
            base.zero_grad()  # not kept alive in the forward pass
            found = closure()
            base.zero_grad()  # nor is what a closure leaves, as of the first evaluation
            for index, (loss, retain_graph) in enumerate(each(found)):
                if index == expected:
                    raise ValueError(f"closure must return {expected} losses as before, got more")
                losses.append(average(loss.detach().to(record.weights)))
                slope = slopes(Weighting(record.weights, record.regularization), losses[-1])[index]
                torch.autograd.backward(loss, slope.to(loss), retain_graph=retain_graph)
        if len(losses) < expected:
            raise ValueError(f"closure must return {expected} losses as before, got {len(losses)}")
        return float(value(torch.stack(losses)))

    return objective


def _tensors(optimizer: Optimizer) -> list[tuple[Tensor | None, int]]:
    """Parameters, each with how often it was changed in place, and their gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moved = [(parameter, parameter._version) for parameter in parameters]
    return [*moved, *((parameter.grad, 0) for parameter in parameters)]


def _same(left: list[tuple[Tensor | None, int]], found: list[tuple[Tensor | None, int]]) -> bool:
    return all(a is b and before == now for (a, before), (b, now) in zip(left, found, strict=True))


def check_gradient(parameters: Iterable[Tensor]) -> None:
    """Check that a closure which returned None has left a gradient: else it has lost its losses.

    Raises:
        TypeError: if no parameter has one.
    """
    if all(parameter.grad is None for parameter in parameters):
        raise TypeError(
            "closure must return the losses, or None after a backward(); "
            "got None and there is no gradient"
        )
