"""Layers that the networks need beyond those of :mod:`torch.nn`."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Per-channel standardisation ``(x - mean) / std`` as the first layer of a network.

    Attacks and bounds see the network from its raw input, so epsilon stays in pixels of [0, 1].

    Args:
        mean: one finite number per channel, in pixels of [0, 1].
        std: one finite number above 0 per channel, same unit.

    Shape:
        ``(..., C, H, W)`` to the same, with C the length of ``mean``.

    Raises:
        ValueError: ``mean`` and ``std`` are empty, differ in length or are out of range.

    >>> Normalize(mean=[0.5], std=[0.25])(torch.ones(1, 1, 1, 2))
    tensor([[[[2., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) == 0 or len(mean) != len(std):
            raise ValueError(
                "mean and std must have one entry per channel each,"
                f" got {len(mean)} and {len(std)} entries"
            )
        if not all(math.isfinite(m) for m in mean):
            raise ValueError(f"mean must be finite, got {list(mean)}")
        if not all(math.isfinite(s) and s > 0 for s in std):
            raise ValueError(f"std must be finite and above 0, got {list(std)}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise images ``(..., C, H, W)``."""
        return (x - self.mean) / self.std


class ElementwiseAffine(nn.Module):
    """``scale * x + shift``, entry by entry.

    Args:
        scale: of the shape of one input without its batch dimension.
        shift: of the same shape.

    Raises:
        ValueError: the shapes differ.

    >>> ElementwiseAffine(torch.tensor([2.0, -1.0]), torch.tensor([0.0, 1.0]))(torch.ones(1, 2))
    tensor([[2., 0.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        if scale.shape != shift.shape:
            raise ValueError(
                "scale and shift must be of one shape,"
                f" got {tuple(scale.shape)} and {tuple(shift.shape)}"
            )
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift inputs ``(batch, *shape)``."""
        return self.scale * x + self.shift


class Residual(nn.Module):
    """The sum of two branches, ``body(x) + shortcut(x)``.

    Args:
        body: a branch.
        shortcut: a branch with outputs of the same shape; the identity by default.

    >>> Residual(nn.Flatten())(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Apply both branches to ``x`` and add their outputs."""
        output: Tensor = applied(self.body, x) + self.shortcut(x)
        return output


def applied(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a network makes of ``x``, which stays as it is where the first layer works in place.

    >>> x = torch.tensor([-1.0])
    >>> applied(nn.ReLU(inplace=True), x), x
    (tensor([0.]), tensor([-1.]))
    """
    return network(x.clone())
