"""Moments of K losses: of their gradients and of the norms (paper, Algorithm 1, lines 4-11).

Norms and the Gramian are float64: squares of gradients between 1e-30 and 1e30 leave the range of
float32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mogd.averages import Averages
from mogd.packs import Gradients


class Moments:
    """m and v of K losses: averages of past gradients and of the norms of past gradients.

    Args:
        decay: β₁ of the gradients and β₂ of the norms, each in [0, 1).
        losses: K, at least 1.
        device: where the norms, the Gramian and the count live.
    """

    def __init__(self, decay: tuple[float, float], losses: int, device: torch.device) -> None:
        self.decay, self.losses = decay, losses
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        # Steps before the first gradient of each loss that is not 0, since the last one has been
        # forgotten. Not in the paper, where all begin at once: one that began later would count as
        # small for as long as the past decays.
        self._late = torch.zeros(losses, dtype=torch.int64, device=device)
        self._exp_avgs = Averages(losses)  # m̂
        self._exp_avg_norms = torch.zeros(losses, dtype=torch.float64, device=device)  # v̂
        self._exp_avg_gramian = torch.zeros(losses, losses, dtype=torch.float64, device=device)

    @property
    def parameters(self) -> Iterable[Tensor]:
        """Those that have had a gradient, in order of first appearance."""
        return self._exp_avgs.parameters

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
        if keep is not None:
            norms = torch.where(keep, norms, self._exp_avg_norms)
        self._exp_avg_norms.lerp_(norms, 1.0 - self.decay[1])
        self.count += 1 if keep is None else keep
        device = self._exp_avg_gramian.device
        gramian = self._exp_avgs.update(gradients, self.decay[0], device, scale, keep)
        self._exp_avg_gramian.copy_(gramian)
        self._forget()

    def _forget(self) -> None:
        """Let losses begin anew of whose gradients nothing is left.

        Not in the paper: m of a gradient that vanished decays until float32 holds it no longer, and
        stops there, while v goes on; weights, which divide by v, would grow without bound.
        """
        left = torch.minimum(self._exp_avg_gramian.diagonal().sqrt(), self._exp_avg_norms)
        forgotten = left < self._exp_avgs.least
        self._exp_avg_norms.masked_fill_(forgotten, 0.0)
        self._exp_avg_gramian.masked_fill_(forgotten, 0.0).masked_fill_(forgotten[:, None], 0.0)
        self._late.copy_(torch.where(forgotten, self.count, self._late))
        if self.decay[0] > self.decay[1]:  # where v is gone first, there is an m that counts
            self._exp_avgs.forget(forgotten)

    def keep_only(self, parameters: Iterable[Tensor]) -> None:
        """Forget the gradients of all others, which are no longer the optimizer's."""
        self._exp_avgs.keep_only(parameters)

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The state as tensors and plain containers, parameters by their position.

        Moments have the shape ``(K, *shape)`` and are sharded as their parameter is. Those of
        parameters that are no longer among ``parameters`` are left out.
        """
        return self._totals() | self._exp_avgs.state_dict(parameters)

    def _totals(self) -> dict[str, Tensor]:
        """What is kept of all parameters together."""
        return {
            "count": self.count,
            "late": self._late,
            "norms": self._exp_avg_norms,
            "gramian": self._exp_avg_gramian,
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
        missing = {"count", "late", "norms", "gramian", "exp_avg", "order"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict['moments'] lacks {sorted(missing)}")
        moments = cls(decay, state_dict["norms"].numel(), device)
        for name, tensor in moments._totals().items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict['moments'] has {name!r} of shape "
                    f"{tuple(state_dict[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state_dict[name])
        moments._exp_avgs = Averages.from_state_dict(state_dict, moments.losses, parameters)
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
