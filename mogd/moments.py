"""Moving averages of the gradients of K losses and of their norms (paper, Algorithm 1, lines 4-11).

Everything small (norms, Gramian, count) is float64: squares of gradients between 1e-30 and 1e30
leave the range of float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = dict[Tensor, Tensor]
"""The gradient of one loss by parameter; a parameter that is absent has a zero gradient."""

# Elements cast to float64 at a time, which bounds the memory:
BLOCK = 1 << 16  # what stays in a processor's cache
GPU_BLOCK = 1 << 22  # few launches


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
        self._exp_avgs: Gradients = {}  # each (K, numel), m̂ without bias correction
        self._exp_avg_norms = torch.zeros(losses, dtype=torch.float64, device=device)  # v̂
        self._exp_avg_gramian = torch.zeros(losses, losses, dtype=torch.float64, device=device)

    @property
    def losses(self) -> int:
        """K, the number of losses."""
        return self._exp_avg_norms.numel()

    def gramian(self) -> Tensor:
        """⟨mⱼ, mₖ⟩ of the bias-corrected moments, shape ``(K, K)``; 0 before any gradient."""
        return bias_corrected(self._exp_avg_gramian, self.decay[0], self.count, power=2)

    def norms(self) -> Tensor:
        """vₖ, the bias-corrected moments of the norms, shape ``(K,)``; 0 before any gradient."""
        return bias_corrected(self._exp_avg_norms, self.decay[1], self.count)

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
        step = torch.ones_like(self.count)
        if keep is not None:
            norms = torch.where(keep, norms, self._exp_avg_norms)
            step = step * keep
        self._exp_avg_norms.lerp_(norms, 1.0 - self.decay[1])
        self.count += step
        self._exp_avg_gramian.zero_()
        for parameter in _ordered_union(self._exp_avgs, *gradients):
            exp_avg = self._exp_avgs.get(parameter)
            if exp_avg is None:
                exp_avg = self._exp_avgs[parameter] = _zeros(parameter, self.losses)
            flat = [
                _flat(of_loss[parameter]) if parameter in of_loss else None for of_loss in gradients
            ]
            size = _block_size(parameter)
            for start in range(0, exp_avg.shape[1], size):
                block = exp_avg[:, start : start + size]
                for row, gradient in zip(block, flat, strict=True):
                    new = None if gradient is None else gradient[start : start + size].to(row)
                    _average(row, new, self.decay[0], scale, keep)
                double = block.double()
                self._exp_avg_gramian += (double @ double.T).to(self._exp_avg_gramian.device)

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The state as tensors and plain containers, parameters by their position."""
        positions = {parameter: position for position, parameter in enumerate(parameters)}
        return {
            "count": self.count,
            "norms": self._exp_avg_norms,
            "gramian": self._exp_avg_gramian,
            # In the order of first appearance: the Gramian's bits depend on it.
            "exp_avg": {
                positions[parameter]: exp_avg for parameter, exp_avg in self._exp_avgs.items()
            },
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
        small = {
            "count": moments.count,
            "norms": moments._exp_avg_norms,
            "gramian": moments._exp_avg_gramian,
        }
        for name, tensor in small.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict['moments'] has {name!r} of shape "
                    f"{tuple(state_dict[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state_dict[name])
        for position, saved in state_dict["exp_avg"].items():
            if position >= len(parameters):
                raise ValueError(
                    f"state_dict['moments'] has parameter {position}, "
                    f"but the optimizer has only {len(parameters)}"
                )
            exp_avg = _zeros(parameters[position], moments.losses)
            if saved.shape != exp_avg.shape:
                raise ValueError(
                    f"state_dict['moments'] of parameter {position} has shape "
                    f"{tuple(saved.shape)}, expected {tuple(exp_avg.shape)}"
                )
            moments._exp_avgs[parameters[position]] = exp_avg.copy_(saved)
        return moments


def bias_corrected(average: Tensor, decay: float, count: Tensor, power: int = 1) -> Tensor:
    """An average that began at zero, over ``(1 - βᵗ)`` to a power; 0 while t is 0.

    Source: paper, Algorithm 1, lines 8-11; a Gramian of averages is corrected twice, power 2.
    """
    correction = (1.0 - decay ** count.double()) ** power
    return torch.where(count > 0, average / correction, torch.zeros_like(average))


def norm(gradients: Gradients, device: torch.device) -> Tensor:
    """‖g‖₂ over all parameters, accumulated in float64: 0-dim, not finite if any entry is not."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients.values():
        for block in torch.split(_flat(gradient), _block_size(gradient)):
            double = block.double()
            square += (double @ double).to(device)
    return square.sqrt()


def _average(
    row: Tensor, new: Tensor | None, decay: float, scale: Tensor | None, keep: Tensor | None
) -> None:
    """m ← β₁ m + (1 - β₁) g, in place; m stays where ``keep`` is False."""
    new = torch.zeros_like(row) if new is None else new
    if scale is not None:
        new = new * scale.to(row)
    if keep is not None:
        new = torch.where(keep, new, row)
    row.lerp_(new, 1.0 - decay)


def _zeros(parameter: Tensor, losses: int) -> Tensor:
    """A row for each loss, real and at least float32."""
    real = torch.view_as_real(parameter.detach()) if parameter.is_complex() else parameter
    dtype = torch.promote_types(real.dtype, torch.float32)
    return torch.zeros(losses, real.numel(), dtype=dtype, device=parameter.device)


def _block_size(tensor: Tensor) -> int:
    return BLOCK if tensor.device.type == "cpu" else GPU_BLOCK


def _flat(gradient: Tensor) -> Tensor:
    """The entries as a real vector."""
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).reshape(-1)


def _ordered_union(*mappings: Gradients) -> Iterator[Tensor]:
    """Every parameter once, in order of first appearance."""
    return iter(dict.fromkeys(parameter for mapping in mappings for parameter in mapping))
