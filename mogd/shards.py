"""Parameters of which a process holds a part: DTensors, as ``fully_shard`` makes them.

All arithmetic is on the entries at hand; a sum over all entries is then added up over processes.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Holders = tuple["ProcessGroup", ...]
"""Groups of processes that divide entries among them, one for each time these are divided."""


_PLAIN = {Tensor, torch.nn.Parameter}  # asked of every tensor at every step: saves the look-up


def is_dtensor(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a tensor is a DTensor; importing the class, to ask by it, would take seconds."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The entries that this process holds, in the same memory; all of a plain tensor."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def holders(tensor: Tensor) -> Holders:
    """Whom to add up with; nobody for a plain tensor, or where entries are replicated."""
    if not is_dtensor(tensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )


def placed_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient divided as its parameter is: one that is still to be added up, added up."""
    if not is_dtensor(gradient) or not is_dtensor(parameter):
        return gradient
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(placements=parameter.placements)


class Sum:
    """A sum over all entries of many tensors, each counted once, wherever it is held.

    Args:
        shape: of the sum.
        device: where to add up; float64.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._parts: dict[Holders, Tensor] = {}

    def part(self, of: Tensor) -> Tensor:
        """What to add, in place, what this process holds of a tensor like this one to."""
        key = holders(of)
        if key not in self._parts:
            self._parts[key] = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        return self._parts[key]

    def total(self) -> Tensor:
        """The sum, the same in each process; to be asked once, by all."""
        for groups, part in self._parts.items():
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
        total, *others = self._parts.values() or [
            torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        ]
        return sum(others, start=total)


def stacked_shape(parameter: Tensor, rows: int) -> tuple[int, ...]:
    """``(rows, *shape)``, real and imaginary parts of a complex parameter last."""
    return (rows, *parameter.shape, *((2,) if parameter.is_complex() else ()))


def stacked(rows: Tensor, parameter: Tensor) -> Tensor:
    """Vectors of a parameter's entries as one tensor, divided over processes as the parameter is.

    Args:
        rows: the entries at hand, shape ``(rows, entries)``.
        parameter: whose they are.

    Returns:
        Shape :func:`stacked_shape`; a DTensor if the parameter is one, else a view.
    """
    view = rows.view(stacked_shape(local(parameter), len(rows)))
    if not is_dtensor(parameter):
        return view
    from torch.distributed.tensor import DTensor

    shape = stacked_shape(parameter, len(rows))
    return DTensor.from_local(
        view.clone(),  # torch neither copies nor saves a DTensor that begins in the midst of memory
        parameter.device_mesh,
        [*map(_one_later, parameter.placements)],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def is_divided_as(stack: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is divided over processes as :func:`stacked` would divide it."""
    if not is_dtensor(parameter) or not is_dtensor(stack):
        return is_dtensor(parameter) == is_dtensor(stack)
    same_mesh = stack.device_mesh == parameter.device_mesh
    return same_mesh and list(stack.placements) == [*map(_one_later, parameter.placements)]


def _one_later(placement: Any) -> Any:
    """Where a stack is divided: one dimension comes before those of the parameter."""
    if placement.is_replicate():
        return placement
    # Of fully_shard after tensor parallelism:
    strided = hasattr(placement, "split_factor")
    options = {"split_factor": placement.split_factor} if strided else {}
    return type(placement)(placement.dim + 1, **options)
