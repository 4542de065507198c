"""One step of Algorithm 1: weigh by the past, take in the present, combine.

The averages are in :mod:`mogd.moments`, the weights in :mod:`mogd.rules`, the sum in
:func:`mogd.gradients.combine`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mogd import parallel
from mogd.gradients import LossGradients, combine
from mogd.moments import Moments
from mogd.nonfinite import Guard, largest_number, sound
from mogd.packs import Gradients, norm
from mogd.priority import Priority, ask
from mogd.record import Record
from mogd.rules import Rule, checked, from_past, slopes
from mogd.shards import local
from mogd.weigh_by import restricted


@dataclass(frozen=True)
class Present:
    """What a step brings.

    Attributes:
        gradients: of K losses, one mapping each, multiplied by the scale of a GradScaler.
        losses: shape ``(K,)``; of this process until they are averaged over all.
        norms: 2-norms of the gradients without that scale, shape ``(K,)``.
        unscale: the inverse of that scale, 0-dim; None without a scaler.
    """

    gradients: Sequence[Gradients]
    losses: Tensor
    norms: Tensor
    unscale: Tensor | None

    @classmethod
    def of(
        cls, collected: LossGradients, scaler: GradScaler | None, device: torch.device
    ) -> "Present":
        """Measure losses and gradients of this process."""
        losses = torch.stack([loss.to(device, torch.float64) for loss in collected.losses])
        norms = torch.stack([norm(gradients, device) for gradients in collected.gradients])
        if scaler is None:
            return cls(collected.gradients, losses, norms, None)
        unscale = scaler.scale(torch.ones((), device=device)).reciprocal()
        return cls(collected.gradients, losses, norms * unscale, unscale)


def agreed(present: Present, last: Record | None, look: bool) -> Present:
    """With the losses averaged over the processes that train one model.

    Args:
        present: the step of this process.
        last: the step before; None at the first.
        look: whether to check that they do, which on a GPU waits for the device.

    Raises:
        RuntimeError: see :func:`mogd.parallel.agree`.
    """
    losses = present.losses
    known = last is not None and last.weights.shape == losses.shape
    last_weights = last.weights if last is not None and known else torch.zeros_like(losses)
    return replace(present, losses=parallel.agree(losses, present.norms, last_weights, look))


def weigh(
    present: Present, past: Moments, rule: Rule, priority: Priority, guard: Guard
) -> tuple[Record, Tensor | bool]:
    """The weights of K losses, and whether the step is to be taken (:meth:`Guard.admit`).

    They come from the past; of the present only the oracle sees the losses (line 16). A step that
    is not to be taken is counted by the guard.

    Raises:
        TypeError, ValueError: if the priority names no loss or the rule no K weights.
        FloatingPointError: see :meth:`Guard.admit`.
    """
    losses, norms = present.losses, present.norms
    gramian, norm_moments = past.gramian(), past.norms()
    largest = largest_number(reached for of in present.gradients for reached in of)
    each = sound(losses, norms, largest)
    prioritized = ask(priority, losses, each)
    # Copies, for a rule may work in place.
    chosen = rule(gramian.clone(), norm_moments.clone(), prioritized.clone())
    weighting = checked(chosen, len(losses), rule)
    if rule.needs_past:
        weighting = from_past(weighting, norm_moments)
    scaled = present.unscale is not None
    finite, keep = guard.admit(each, norms, slopes(weighting, losses), largest, scaled)
    return Record(losses, *weighting, gramian, norm_moments, prioritized, finite), keep


def take_in(
    present: Present, past: Moments, weigh_by: frozenset[Tensor] | None, keep: Tensor | None
) -> None:
    """Make a step a part of the past (lines 4 to 11), as far as its weights come from it.

    Args:
        present: the step's gradients.
        past: changes in place.
        weigh_by: the parameters whose gradients the weights come from; all if None.
        keep: 0-dim bool; where it is False, no moment changes. None is True.
    """
    gradients, norms = present.gradients, present.norms
    if weigh_by is not None:
        gradients, norms = restricted(gradients, weigh_by, norms.device)
        norms = norms if present.unscale is None else norms * present.unscale
    past.update(gradients, norms, scale=present.unscale, keep=keep)


def leave(present: Present, factors: Tensor, keep: Tensor | None) -> None:
    """Leave Σₖ factorₖ gₖ in the ``.grad`` of the parameters.

    Args:
        present: the step's gradients, which are overwritten.
        factors: κ + 2 κ_reg L, shape ``(K,)``.
        keep: 0-dim bool; where it is False, 0 is left. None is True.
    """
    drop = None if keep is None else ~keep
    for parameter, gradient in combine(present.gradients, factors).items():
        if drop is not None:
            local(gradient).masked_fill_(drop.to(gradient.device), 0.0)
        parameter.grad = gradient
