"""Weights from the gradients of some parameters alone, the last layer for instance."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mogd.arguments import is_layer
from mogd.packs import Gradients, norm


def some_of(
    parameters: Iterable[Tensor], weigh_by: Iterable[Tensor] | None
) -> frozenset[Tensor] | None:
    """What to weigh by, or a TypeError or ValueError."""
    if weigh_by is None:
        return None
    if is_layer(weigh_by) or isinstance(weigh_by, Tensor) or not isinstance(weigh_by, Iterable):
        raise TypeError(
            "weigh_by must be an iterable of parameters (layer.parameters()), "
            f"got {type(weigh_by).__name__}"
        )
    chosen, known = list(weigh_by), set(parameters)
    foreign = [one for one in chosen if not isinstance(one, Tensor) or one not in known]
    if foreign or not chosen:
        found = f"{len(foreign)} others" if foreign else "none"
        raise ValueError(f"weigh_by must hold parameters of the optimizer, got {found}")
    return frozenset(chosen)


def restricted(
    gradients: Sequence[Gradients], chosen: frozenset[Tensor], device: torch.device
) -> tuple[list[Gradients], Tensor]:
    """The parts of K gradients that are of some parameters, and their 2-norms, shape ``(K,)``."""
    kept = [{p: g for p, g in of.items() if p in chosen} for of in gradients]
    return kept, torch.stack([norm(of, device) for of in kept])
