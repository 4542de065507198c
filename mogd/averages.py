"""Exponential moving averages of K losses' gradients, kept in few long vectors.

Of a parameter that processes share, each keeps the averages of its own part.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mogd.packs import Doubles, Gradients, block_size, groups, joined
from mogd.shards import Sum, is_divided_as, local, stacked, stacked_shape

LEAST: Mapping[torch.dtype, float] = {
    torch.float32: torch.finfo(torch.float32).tiny,
    torch.float64: 1e-150,  # whose square float64 holds
}
"""The least norm that averages of a type tell from 0."""


class Averages:
    """m̂ of K losses, not bias-corrected, by parameter; 0 before a parameter's first gradient.

    Args:
        losses: K, at least 1.
    """

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self._parameters: dict[Tensor, None] = {}  # in order of first appearance
        self._groups: list[list[Tensor]] = []  # of these parameters
        self._vectors: list[Tensor] = []  # m̂ of each group, (K, entries)

    @property
    def parameters(self) -> Iterable[Tensor]:
        """Those that have had a gradient, in order of first appearance."""
        return self._parameters.keys()

    def update(
        self,
        gradients: Sequence[Gradients],
        decay: float,
        device: torch.device,
        scale: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        """Take in the gradients of one step (paper, Algorithm 1, lines 4 and 5).

        Args:
            gradients: one mapping a loss.
            decay: β₁, in [0, 1).
            device: of what is returned.
            scale: factor by which to multiply the gradients first; 1 if None.
            keep: 0-dim bool tensor; where it is False no average changes.

        Returns:
            ⟨m̂ⱼ, m̂ₖ⟩ after it, of all processes that share parameters, float64, ``(K, K)``.
        """
        self._include(parameter for of_loss in gradients for parameter in of_loss)
        gramian = Sum((self.losses, self.losses), device)
        doubles = Doubles()
        for group, averages in zip(self._groups, self._vectors, strict=True):
            vectors = [_vector(of_loss, group) for of_loss in gradients]
            part, size = gramian.part(group[0]), block_size(averages)
            for start in range(0, averages.shape[1], size):
                block = averages[:, start : start + size]
                for row, vector in zip(block, vectors, strict=True):
                    new = None if vector is None else vector[start : start + size].to(row)
                    _average(row, new, decay, scale, keep)
                double = doubles(block)
                part += (double @ double.T).to(part.device)
        return gramian.total()

    @property
    def least(self) -> float:
        """Norms below it are those of no gradient: averages that decay never reach 0."""
        dtypes = {averages.dtype for averages in self._vectors} or {torch.float32}
        return max(LEAST[dtype] for dtype in dtypes)

    def forget(self, losses: Tensor) -> None:
        """Set those of some losses to 0.

        Args:
            losses: which, bool ``(K,)``.
        """
        for averages in self._vectors:
            averages.masked_fill_(losses[:, None].to(averages.device), 0.0)

    def keep_only(self, parameters: Iterable[Tensor]) -> None:
        """Forget the gradients of all others."""
        present = set(parameters)
        kept = [parameter for parameter in self._parameters if parameter in present]
        if len(kept) < len(self._parameters):
            self._arrange(kept)

    def _include(self, parameters: Iterable[Tensor]) -> None:
        """Give parameters that are new a past of zeros; keep up where all were cast together."""
        new = [parameter for parameter in parameters if parameter not in self._parameters]
        pairs = zip(self._groups, self._vectors, strict=True)
        if new or any(_dtype(group[0]) is not averages.dtype for group, averages in pairs):
            self._arrange([*self._parameters, *new])

    def _arrange(self, parameters: Iterable[Tensor]) -> None:
        past = self._by_parameter()
        self._parameters = dict.fromkeys(parameters)
        self._groups = groups(self._parameters)
        self._vectors = [_zeros(group, self.losses) for group in self._groups]
        for parameter, average in self._by_parameter().items():
            if parameter in past:
                average.copy_(past[parameter])

    def _by_parameter(self) -> dict[Tensor, Tensor]:
        """m̂ of each parameter's part here, ``(K, entries)``, views in order of first appearance."""
        views: dict[Tensor, Tensor] = {}
        for group, averages in zip(self._groups, self._vectors, strict=True):
            parts = torch.split(averages, [_entries(parameter) for parameter in group], dim=1)
            views.update(zip(group, parts, strict=True))
        return {parameter: views[parameter] for parameter in self._parameters}

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The averages by their parameter's position, and the order of these.

        They have the shape ``(K, *shape)`` and are sharded as their parameter is. Those of
        parameters that are no longer among ``parameters`` are left out.
        """
        positions = {parameter: position for position, parameter in enumerate(parameters)}
        averages = {
            positions[parameter]: stacked(average, parameter)
            for parameter, average in self._by_parameter().items()
            if parameter in positions
        }
        # The order is that of first appearance: the Gramian's bits depend on it, and who loads into
        # tensors that exist already, as torch.distributed.checkpoint, keeps the order of these.
        return {"exp_avg": averages, "order": list(averages)}

    @classmethod
    def from_state_dict(
        cls, state_dict: dict[str, Any], losses: int, parameters: Sequence[Tensor]
    ) -> "Averages":
        """The averages that :meth:`state_dict` described, copied to the parameters' devices.

        Raises:
            ValueError: if an entry does not fit the parameters.
        """
        saved, order = state_dict["exp_avg"], state_dict["order"]
        if set(order) != saved.keys():
            raise ValueError(
                f"state_dict['moments'] has 'exp_avg' of parameters {sorted(saved)}, expected "
                f"{sorted(order)}: it was loaded into the state of an optimizer of other losses"
            )
        by_parameter: dict[Tensor, Tensor] = {}
        for position in order:
            _check_fit(saved[position], position, parameters, losses)
            by_parameter[parameters[position]] = saved[position]
        averages = cls(losses)
        averages._include(by_parameter)
        for parameter, average in averages._by_parameter().items():
            average.copy_(local(by_parameter[parameter]).reshape(average.shape))
        return averages


def _check_fit(average: Tensor, position: int, parameters: Sequence[Tensor], losses: int) -> None:
    """Check that averages which were saved are of the parameter at this position."""
    if not 0 <= position < len(parameters):
        raise ValueError(
            f"state_dict['moments'] has parameter {position}, "
            f"but the optimizer has only {len(parameters)}"
        )
    parameter = parameters[position]
    expected = stacked_shape(parameter, losses)
    if average.shape != expected:
        raise ValueError(
            f"state_dict['moments'] of parameter {position} has shape "
            f"{tuple(average.shape)}, expected {expected}"
        )
    if not is_divided_as(average, parameter):
        raise ValueError(
            f"state_dict['moments'] of parameter {position} is not sharded over processes "
            "as the parameter is: let torch.distributed.checkpoint load it"
        )


def _average(
    row: Tensor, new: Tensor | None, decay: float, scale: Tensor | None, keep: Tensor | None
) -> None:
    """m ← β₁ m + (1 - β₁) g, in place; m stays where ``keep`` is False."""
    new = torch.zeros_like(row) if new is None else new
    if scale is not None:
        new = new * scale.to(row)
    if keep is not None:
        new = torch.where(keep.to(row.device), new, row)
    row.lerp_(new, 1.0 - decay)


def _vector(gradients: Gradients, group: Sequence[Tensor]) -> Tensor | None:
    """The gradients of a group as one real vector; None if all are absent."""
    if gradients.keys().isdisjoint(group):
        return None
    return joined(
        [
            gradients[parameter] if parameter in gradients else torch.zeros_like(local(parameter))
            for parameter in group
        ]
    )


def _zeros(group: Sequence[Tensor], losses: int) -> Tensor:
    """m̂ of a group, real and at least float32."""
    size, device = sum(map(_entries, group)), group[0].device
    return torch.zeros(losses, size, dtype=_dtype(group[0]), device=device)


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype.to_real(), torch.float32)


def _entries(parameter: Tensor) -> int:
    """How many real numbers of a parameter are here."""
    return local(parameter).numel() * (2 if parameter.is_complex() else 1)
