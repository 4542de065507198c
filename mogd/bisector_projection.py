"""The paper's rule (Algorithm 1, lines 12-22): bisector in agreement, projection in conflict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from mogd.elimination import solve
from mogd.rules import (
    Rule,
    Weighting,
    against,
    conflicting,
    constants,
    favoured_with_gradient,
    onto_favoured,
)


def bisector(gramian: Tensor, norms: Tensor, preference: Sequence[float] | None = None) -> Tensor:
    """Weights of the step along d = Σₖ pₖ mₖ/vₖ, as long as the mean projection of the mₖ on it.

    κₖ = γ pₖ/vₖ with γ = (1/K) Σₖ max(⟨mₖ, d⟩, 0) / ‖d‖². With equal pₖ, d is the sum of the
    normalised moments; for two losses their bisector: the paper's Algorithm 1, lines 13-14.

    Args:
        gramian: inner products of the moments, shape ``(K, K)``.
        norms: moments of the norms, shape ``(K,)``.
        preference: K numbers pₖ > 0, of which only the ratios count; equal ones where None.

    >>> bisector(torch.eye(2), torch.ones(2))
    tensor([0.5000, 0.5000])
    >>> bisector(torch.eye(2), torch.ones(2), preference=(1.0, 3.0))
    tensor([0.2000, 0.6000])
    """
    scale = _or_0(norms.reciprocal(), norms)
    if preference is not None:
        # At most 1: a large preference must not leave the range of floats where a norm is tiny.
        scale = scale * constants([one / max(preference) for one in preference], norms)
    onto_direction = gramian @ scale  # ⟨mₖ, d⟩
    square = scale @ onto_direction  # ‖d‖²
    # A loss that would rise along d, where others than the favoured one conflict, does not lengthen
    # the step, nor turn it round.
    return _or_0(onto_direction.clamp(min=0.0).mean() / square, square) * scale


def projection(gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Tensor:
    """Weights of the favoured gradient with its part in the span of those against it removed.

    κᵢ = 1 for the favoured loss i, and κ_C = -V⁻¹ R⁻¹ V⁻¹ ⟨m_C, mᵢ⟩ for the losses C that conflict
    with it, where V holds their lengths and R the cosines between their moments; 0 for all others.
    A length is vₖ, and of more than two losses at least ‖mₖ‖. Where it is ‖mₖ‖, this projects mᵢ
    onto the orthogonal complement of C. For two losses κⱼ = -⟨mᵢ, mⱼ⟩/vⱼ²: the paper's Algorithm 1,
    lines 17 and 19.

    Args:
        gramian: inner products of the moments, shape ``(K, K)``.
        norms: moments of the norms, shape ``(K,)``.
        prioritized: index i of the favoured loss, 0-dim integer tensor.

    >>> projection(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.ones(2), torch.tensor(0))
    tensor([1.0000, 0.5000])
    """
    favoured = torch.arange(len(norms), device=norms.device) == prioritized
    opposed = against(gramian, prioritized)  # C
    if len(norms) > 2:
        norms = torch.maximum(norms, gramian.diagonal().sqrt())
    # Divided twice, not by the square: vⱼ² leaves the range of floats before the quotient does.
    products = onto_favoured(gramian, prioritized)
    span = _or_0(torch.where(opposed, products / norms, 0.0), norms)
    if len(norms) > 2:  # of two losses, one at most is against the other
        span = solve(_cosines(gramian, norms, opposed), span)
    return _or_0(-span / norms, norms).masked_fill(favoured, 1.0)


def _cosines(gramian: Tensor, lengths: Tensor, among: Tensor) -> Tensor:
    """R of some of the moments; the others, and those that are 0, are orthogonal to all."""
    cosines = _or_0(_or_0(gramian / lengths, lengths) / lengths[:, None], lengths[:, None])
    return torch.where(among & among[:, None], cosines, 0.0).fill_diagonal_(1.0)


@dataclass(frozen=True)
class BisectorProjection(Rule):
    """The paper's rule: the bisector where moments agree, a projection where they conflict.

    For two losses it is the paper's to the bit. For more: where none conflicts with the favoured
    one, the sum of all normalised gradients; else the favoured gradient projected off the span of
    those that conflict with it, and no other.

    Args:
        regularization: κ_reg ≥ 0, the weight of the favoured loss's square while there is a
            conflict and it is not the first loss (½ in the paper, where it is the second). For
            losses of at least 0: below -1 / (2 κ_reg) the square falls faster than the loss rises,
            and the step would raise it.
        preference: pₖ > 0, how far the step leans to each loss in agreement: along
            Σₖ pₖ mₖ/vₖ. Equal numbers, the default, are the bisector; only the ratios count. In
            conflict the priority decides.
        length: what the rule takes for the length of a gradient: ``"mean_norm"``, the paper's vₖ,
            or ``"norm_of_mean"``, ‖mₖ‖. Noise makes vₖ the larger one, and then the projection
            removes too little; with ‖mₖ‖ the step along the moments is orthogonal to those
            against it, and noisier, for the weights grow by vₖ/‖mₖ‖.

    Raises:
        ValueError: if ``regularization`` is negative or not finite, ``preference`` is not two
            or more finite numbers above 0, or ``length`` is unknown; on use, if there is one loss,
            or the preference has another number than there are losses.

    What it guarantees of the step u = Σₖ κₖ mₖ along the moments, for each K:

    - without conflict, ⟨mₖ, u⟩ > 0 for the favoured loss, and for every k if no two conflict (and
      it has had a gradient);
    - in conflict with i favoured, ⟨mᵢ, u⟩ ≥ 0; of two losses only where v of the other is no less
      than ‖m‖, which fails while its gradients grow fast;
    - with ``"norm_of_mean"`` also ⟨mⱼ, u⟩ = 0 for every j against i, or within a tenth of both
      lengths where its moment is within 6° of the span of those before it.

    For K = 2 these are both losses. For more, nothing is promised of the losses that agree with i,
    for what is removed may have been their part of it; and weights may be negative, and several
    times the ratio of two lengths where moments against i are nearly parallel.

    Where ⟨m₁, m₂⟩ → 0⁺ (two unit moments) the weights tend to (½, ½); at 0 they jump to the unit
    vector of the favoured loss, so the step jumps by ‖m₁ - m₂‖/2.

    Source: paper, Algorithm 1, lines 12-22; more than two losses are our own.
    """

    regularization: float = 0.5
    preference: Sequence[float] | None = None  # p
    length: Literal["mean_norm", "norm_of_mean"] = "mean_norm"

    def __post_init__(self) -> None:
        regularization = _number(self.regularization)
        if not 0.0 <= regularization < math.inf:
            raise ValueError(
                "regularization must be a number, finite and at least 0, "
                f"got {self.regularization!r}"
            )
        object.__setattr__(self, "regularization", regularization)
        if self.preference is not None:
            several = isinstance(self.preference, tuple | list) and len(self.preference) > 1
            preference = tuple(map(_number, self.preference)) if several else ()
            if not preference or not all(0.0 < p < math.inf for p in preference):
                raise ValueError(
                    "preference must be a tuple or list, a finite number above 0 for each of two "
                    f"or more losses, got {self.preference!r}"
                )
            object.__setattr__(self, "preference", preference)
        if self.length not in ("mean_norm", "norm_of_mean"):
            raise ValueError(f"length must be 'mean_norm' or 'norm_of_mean', got {self.length!r}")

    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        losses = norms.numel()
        if losses < 2:
            raise ValueError(
                f"BisectorProjection weighs 2 losses or more, got {losses}; "
                "give UnbiasedMultiGradient another rule"
            )
        if self.preference is not None and len(self.preference) != losses:
            raise ValueError(
                f"preference must have a number for each of {losses} losses, "
                f"got {self.preference!r}"
            )
        # Of two losses, one without a gradient leaves no conflict to project out of.
        favoured = prioritized if losses == 2 else favoured_with_gradient(norms, prioritized)
        conflict = conflicting(gramian, norms, favoured)
        lengths = gramian.diagonal().sqrt() if self.length == "norm_of_mean" else norms
        weights = torch.where(
            conflict,
            projection(gramian, lengths, favoured),
            bisector(gramian, lengths, self.preference),
        )
        # 0 for the first loss, and 1 for another where a conflict favours it:
        indices = torch.arange(losses, device=norms.device)
        regularized = (indices > 0) & (indices == prioritized) & (norms > 0) & conflict
        return Weighting(
            weights,
            self.regularization * regularized.to(norms),
        )


def _number(value: object) -> float:
    """Any number, numpy's too, as a float; NaN for what is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # of an integer
        return math.inf


def _or_0(quotient: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0: a gradient never seen gets no weight."""
    return quotient.masked_fill(denominator == 0, 0.0)
