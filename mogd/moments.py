"""Moving averages of the gradients of K losses and of their norms (paper, Algorithm 1, lines 4-11).

Norms and the Gramian are float64: squares of gradients between 1e-30 and 1e30 leave the range of
float32. Of a parameter that processes share, each keeps the moments of its own part.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mogd.packs import Doubles, Gradients, block_size, groups, joined
from mogd.shards import Sum, is_divided_as, local, stacked, stacked_shape


class Moments:
    """m and v of K losses: averages of past gradients and of the norms of past gradients.

    Args:
        decay: β₁ of the gradients and β₂ of the norms, each in [0, 1).
        losses: K, at least 1.
        device: where the norms, the Gramian and the count live.
    """

    def __init__(self, decay: tuple[float, float], losses: int, device: torch.device) -> None:
        self.decay = decay
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        # Steps before the first gradient of each loss that is not 0. Not in the paper, where all
        # begin at once: one that began later would count as small for as long as the past decays.
        self._late = torch.zeros(losses, dtype=torch.int64, device=device)
        self._parameters: dict[Tensor, None] = {}  # in order of first appearance
        self._groups: list[list[Tensor]] = []  # of these parameters
        self._exp_avgs: list[Tensor] = []  # m̂ of each group, (K, entries), not bias-corrected
        self._exp_avg_norms = torch.zeros(losses, dtype=torch.float64, device=device)  # v̂
        self._exp_avg_gramian = torch.zeros(losses, losses, dtype=torch.float64, device=device)

    @property
    def losses(self) -> int:
        """K, the number of losses."""
        return self._exp_avg_norms.numel()

    @property
    def parameters(self) -> Iterable[Tensor]:
        """Those that have had a gradient, in order of first appearance."""
        return self._parameters.keys()

    def gramian(self) -> Tensor:
        """⟨mⱼ, mₖ⟩ of the bias-corrected moments, shape ``(K, K)``; 0 before any gradient."""
        return bias_corrected(self._exp_avg_gramian, self.decay[0], self.count - self._late)

    def norms(self) -> Tensor:
        """vₖ, the bias-corrected moments of the norms, shape ``(K,)``; 0 before any gradient."""
        return bias_corrected(self._exp_avg_norms, self.decay[1], self.count - self._late)

    @torch.no_grad()
    def update(
        self,
        gradients: Sequence[Gradients],
        norms: Tensor,
        *,
        scale: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> None:
        """Take in the gradients of one step.

        Args:
            gradients: one mapping a loss.
            norms: 2-norms of these gradients (after scaling), shape ``(K,)``.
            scale: factor by which to multiply the gradients first; 1 if None.
            keep: 0-dim bool tensor; where it is False nothing changes (without asking the device).
        """
        waiting = (self._late == self.count) & (norms == 0)
        if keep is not None:
            norms, waiting = torch.where(keep, norms, self._exp_avg_norms), waiting & keep
        self._exp_avg_norms.lerp_(norms, 1.0 - self.decay[1])
        self._late += waiting
        self.count += 1 if keep is None else keep
        self._include(parameter for of_loss in gradients for parameter in of_loss)
        gramian = Sum(self._exp_avg_gramian.shape, self._exp_avg_gramian.device)
        doubles = Doubles()
        for group, exp_avg in zip(self._groups, self._exp_avgs, strict=True):
            vectors = [_vector(of_loss, group) for of_loss in gradients]
            part, size = gramian.part(group[0]), block_size(exp_avg)
            for start in range(0, exp_avg.shape[1], size):
                block = exp_avg[:, start : start + size]
                for row, vector in zip(block, vectors, strict=True):
                    new = None if vector is None else vector[start : start + size].to(row)
                    _average(row, new, self.decay[0], scale, keep)
                double = doubles(block)
                part += (double @ double.T).to(part.device)
        self._exp_avg_gramian.copy_(gramian.total())

    def _include(self, parameters: Iterable[Tensor]) -> None:
        """Give parameters that are new a past of zeros."""
        new = [parameter for parameter in parameters if parameter not in self._parameters]
        if new:
            self._arrange([*self._parameters, *new])

    def keep_only(self, parameters: Iterable[Tensor]) -> None:
        """Forget the gradients of all others, which are no longer the optimizer's."""
        present = set(parameters)
        kept = [parameter for parameter in self._parameters if parameter in present]
        if len(kept) < len(self._parameters):
            self._arrange(kept)

    def _arrange(self, parameters: Iterable[Tensor]) -> None:
        past = self._by_parameter()
        self._parameters = dict.fromkeys(parameters)
        self._groups = groups(self._parameters)
        self._exp_avgs = [_zeros(group, self.losses) for group in self._groups]
        for parameter, exp_avg in self._by_parameter().items():
            if parameter in past:
                exp_avg.copy_(past[parameter])

    def _by_parameter(self) -> dict[Tensor, Tensor]:
        """m̂ of each parameter's part here, ``(K, entries)``, views in order of first appearance."""
        views: dict[Tensor, Tensor] = {}
        for group, exp_avg in zip(self._groups, self._exp_avgs, strict=True):
            parts = torch.split(exp_avg, [_entries(parameter) for parameter in group], dim=1)
            views.update(zip(group, parts, strict=True))
        return {parameter: views[parameter] for parameter in self._parameters}

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The state as tensors and plain containers, parameters by their position.

        Moments have the shape ``(K, *shape)`` and are sharded as their parameter is. Those of
        parameters that are no longer among ``parameters`` are left out.
        """
        positions = {parameter: position for position, parameter in enumerate(parameters)}
        exp_avgs = {
            positions[parameter]: stacked(exp_avg, parameter)
            for parameter, exp_avg in self._by_parameter().items()
            if parameter in positions
        }
        return {
            "count": self.count,
            "late": self._late,
            "norms": self._exp_avg_norms,
            "gramian": self._exp_avg_gramian,
            "exp_avg": exp_avgs,
            # Of first appearance: the Gramian's bits depend on it, and who loads into tensors that
            # exist already, as torch.distributed.checkpoint, keeps the order of these.
            "order": list(exp_avgs),
        }

    @classmethod
    def from_state_dict(
        cls,
        state_dict: dict[str, Any],
        decay: tuple[float, float],
        parameters: Sequence[Tensor],
        device: torch.device,
    ) -> "Moments":
        """The moments that :meth:`state_dict` described, copied to the parameters' devices.

        Raises:
            ValueError: if an entry is missing or does not fit the parameters.
        """
        missing = {"count", "norms", "gramian", "exp_avg"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict['moments'] lacks {sorted(missing)}")
        moments = cls(decay, state_dict["norms"].numel(), device)
        state_dict = {"late": torch.zeros_like(moments._late)} | state_dict  # older ones have none
        small = {
            "count": moments.count,
            "norms": moments._exp_avg_norms,
            "gramian": moments._exp_avg_gramian,
            "late": moments._late,
        }
        for name, tensor in small.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict['moments'] has {name!r} of shape "
                    f"{tuple(state_dict[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state_dict[name])
        exp_avgs = state_dict["exp_avg"]
        order = state_dict.get("order", list(exp_avgs))  # older states have none
        if set(order) != exp_avgs.keys():
            raise ValueError(
                f"state_dict['moments'] has 'exp_avg' of parameters {sorted(exp_avgs)}, expected "
                f"{sorted(order)}: it was loaded into the state of an optimizer of other losses"
            )
        saved: dict[Tensor, Tensor] = {}
        for position in order:
            _check_fit(exp_avgs[position], position, parameters, moments.losses)
            saved[parameters[position]] = exp_avgs[position]
        moments._include(saved)
        for parameter, exp_avg in moments._by_parameter().items():
            exp_avg.copy_(local(saved[parameter]).reshape(exp_avg.shape))
        return moments


def bias_corrected(average: Tensor, decay: float, steps: Tensor) -> Tensor:
    """Averages that began at zero, over ``1 - βᵗ``; still 0 while t is 0.

    Args:
        average: of K losses, shape ``(K,)``, or the Gramian of such, ``(K, K)``, which is
            corrected for both.
        decay: β in [0, 1).
        steps: t of each loss, shape ``(K,)``.

    Source: paper, Algorithm 1, lines 8-11.
    """
    correction = 1.0 - decay ** steps.clamp(min=1).double()
    return average / (correction if average.dim() == 1 else torch.outer(correction, correction))


def _check_fit(exp_avg: Tensor, position: int, parameters: Sequence[Tensor], losses: int) -> None:
    """Check that moments which were saved are of the parameter at this position."""
    if not 0 <= position < len(parameters):
        raise ValueError(
            f"state_dict['moments'] has parameter {position}, "
            f"but the optimizer has only {len(parameters)}"
        )
    parameter = parameters[position]
    expected = stacked_shape(parameter, losses)
    flat = losses, _entries(parameter)  # as mogd saved them once
    if exp_avg.shape not in (expected, flat):
        raise ValueError(
            f"state_dict['moments'] of parameter {position} has shape "
            f"{tuple(exp_avg.shape)}, expected {expected}"
        )
    if not is_divided_as(exp_avg, parameter):
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
    dtype = torch.promote_types(group[0].dtype.to_real(), torch.float32)
    return torch.zeros(losses, sum(map(_entries, group)), dtype=dtype, device=group[0].device)


def _entries(parameter: Tensor) -> int:
    """How many real numbers of a parameter are here."""
    return local(parameter).numel() * (2 if parameter.is_complex() else 1)
