"""From the Gramian of the moments to the weights of the losses (paper, Algorithm 1, lines 12-22).

A rule never sees a gradient: all it knows are the inner products and the norm moments.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Weighting(NamedTuple):
    """What a rule decides for K losses.

    ``weights`` (κ, shape ``(K,)``) multiply the gradients; ``regularization`` (κ_reg, shape
    ``(K,)``) multiplies the squared losses (paper, Algorithm 2, line 11).
    """

    weights: Tensor
    regularization: Tensor


class Rule(ABC):
    """A map from the moments of K losses, and the index of the favoured one, to weights."""

    @abstractmethod
    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        """Weigh K losses.

        Args:
            gramian: ⟨mⱼ, mₖ⟩ of the bias-corrected gradient moments, shape ``(K, K)``.
            norms: vₖ, the bias-corrected moments of the gradients' 2-norms, shape ``(K,)``.
            prioritized: index of the loss to favour in conflict, 0-dim integer tensor.

        Returns:
            Finite weights and regularisation, each of shape ``(K,)``.
        """


def conflicting(gramian: Tensor, norms: Tensor) -> Tensor:
    """Whether two moments disagree: ⟨mⱼ, mₖ⟩ ≤ 0 for a pair j ≠ k, once there is a gradient.

    Args:
        gramian: inner products of the moments, shape ``(K, K)``.
        norms: moments of the norms, shape ``(K,)``; all 0 before any gradient.

    Returns:
        0-dim bool tensor.

    Source: paper, Algorithm 1, line 12.

    >>> conflicting(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.ones(2))
    tensor(True)
    """
    return (gramian <= 0).triu(diagonal=1).any() & _seen(norms)


def bisector(gramian: Tensor, norms: Tensor, preference: Sequence[float] = (1.0, 1.0)) -> Tensor:
    """Weights of the step along d = Σₖ pₖ mₖ/vₖ, as long as the mean projection of the mₖ on it.

    κₖ = γ pₖ/vₖ with γ = ½ ⟨m₁ + m₂, d⟩ / ‖d‖². With p = (1, 1), or any equal numbers, d is the
    bisector and this is the paper's Algorithm 1, lines 13-14.

    Args:
        gramian: inner products of the moments, shape ``(2, 2)``.
        norms: moments of the norms, shape ``(2,)``.
        preference: pₖ > 0; only their ratio counts.

    >>> bisector(torch.eye(2), torch.ones(2))
    tensor([0.5000, 0.5000])
    >>> bisector(torch.eye(2), torch.ones(2), preference=(1.0, 3.0))
    tensor([0.2000, 0.6000])
    """
    # At most 1: a large preference must not leave the range of floats where a norm is tiny.
    shares = _constants([preferred / max(preference) for preferred in preference], norms)
    scale = shares * _or_0(norms.reciprocal(), norms)
    onto_direction = gramian @ scale  # ⟨mₖ, d⟩
    square = scale @ onto_direction  # ‖d‖²
    return _or_0(onto_direction.mean() / square, square) * scale


def projection(gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Tensor:
    """Weights of the favoured gradient with its part along the other removed.

    κᵢ = 1 for the favoured loss i and κⱼ = -⟨m₁, m₂⟩/vⱼ² for the other (paper, Algorithm 1,
    lines 17 and 19).

    Args:
        gramian: inner products of the moments, shape ``(2, 2)``.
        norms: moments of the norms, shape ``(2,)``.
        prioritized: index i of the favoured loss, 0-dim integer tensor.

    >>> projection(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.ones(2), torch.tensor(0))
    tensor([1.0000, 0.5000])
    """
    # Divided twice, not by the square: vⱼ² leaves the range of floats before the quotient does.
    removed = _or_0(-gramian.diagonal(1) / norms / norms, norms)
    favoured = torch.arange(2, device=norms.device) == prioritized
    return removed.masked_fill(favoured, 1.0)


@dataclass(frozen=True)
class BisectorProjection(Rule):
    """The paper's rule for two losses: bisector in agreement, projection in conflict.

    Args:
        regularization: κ_reg ≥ 0, the weight of ‖L₂‖² while a conflict favours the second loss
            (½ in the paper).
        preference: pₖ > 0, how far the step leans to each loss in agreement: along
            Σₖ pₖ mₖ/vₖ. Equal numbers, the default, are the paper's bisector; only the ratio
            counts. In conflict the priority decides.
        length: what the rule takes for the length of a gradient: ``"mean_norm"``, the paper's vₖ,
            or ``"norm_of_mean"``, ‖mₖ‖. Noise makes vₖ the larger one, and then the projection
            removes too little; with ‖mₖ‖ the step along the moments is orthogonal to the other
            moment, and noisier, for the weights grow by vₖ/‖mₖ‖.

    Raises:
        ValueError: if ``regularization`` is negative or not finite, ``preference`` is not two
            finite numbers above 0, or ``length`` is unknown; on use, if K is not 2.

    Where ⟨m₁, m₂⟩ → 0⁺ (unit moments) the weights tend to (½, ½); at 0 they jump to the unit
    vector of the favoured loss, so the step jumps by ‖m₁ - m₂‖/2.

    Source: paper, Algorithm 1, lines 12-22.
    """

    regularization: float = 0.5
    preference: tuple[float, float] = (1.0, 1.0)  # p
    length: Literal["mean_norm", "norm_of_mean"] = "mean_norm"

    def __post_init__(self) -> None:
        if not 0.0 <= self.regularization < float("inf"):
            raise ValueError(
                f"regularization must be finite and at least 0, got {self.regularization!r}"
            )
        pair = isinstance(self.preference, tuple | list) and len(self.preference) == 2
        if not pair or not all(map(_is_positive, self.preference)):
            raise ValueError(
                f"preference must be two finite numbers above 0, got {self.preference!r}"
            )
        object.__setattr__(self, "preference", tuple(map(float, self.preference)))
        if self.length not in ("mean_norm", "norm_of_mean"):
            raise ValueError(f"length must be 'mean_norm' or 'norm_of_mean', got {self.length!r}")

    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        if norms.numel() != 2:
            raise ValueError(
                f"BisectorProjection weighs 2 losses, got {norms.numel()}; "
                "give UnbiasedMultiGradient another rule for more or fewer"
            )
        conflict = conflicting(gramian, norms)
        lengths = gramian.diagonal().sqrt() if self.length == "norm_of_mean" else norms
        weights = torch.where(
            conflict,
            projection(gramian, lengths, prioritized),
            bisector(gramian, lengths, self.preference),
        )
        # 0 for the first loss, and 1 for the second where a conflict favours it:
        regularized = torch.arange(2, device=norms.device) * (conflict & (prioritized == 1))
        return Weighting(
            torch.where(_seen(norms), weights, 0.5), self.regularization * regularized.to(norms)
        )


@dataclass(frozen=True)
class Constant(Rule):
    """The weighted sum of the losses: the same weights at every step, from the first on.

    Args:
        weights: one finite number a loss.

    Raises:
        ValueError: if ``weights`` is empty or not finite; on use, if K is another.

    Source: paper, equation 5.
    """

    weights: Sequence[float]

    def __post_init__(self) -> None:
        weights = torch.as_tensor(self.weights)
        if weights.dim() != 1 or weights.numel() == 0 or not weights.isfinite().all():
            raise ValueError(
                f"weights must be one finite number for each loss, got {self.weights!r}"
            )

    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        if norms.numel() != len(self.weights):
            raise ValueError(
                f"Constant has weights for {len(self.weights)} losses, got {norms.numel()} losses"
            )
        weights = _constants(self.weights, norms)
        return Weighting(weights, torch.zeros_like(weights))


@dataclass(frozen=True)
class GramianRule(Rule):
    """Any function from a Gramian to weights, a weighting of another library for instance.

    ``UnbiasedMultiGradient`` wraps a plain callable in this. The function gets the Gramian of the
    moments, shape ``(K, K)``, instead of this batch's, so its weights become unbiased; before any
    gradient has been seen it gets the identity, and the weights are 1/K whatever it returns.

    Raises:
        ValueError: on use, if the function returns anything but K weights.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        seen = _seen(norms)
        identity = torch.eye(norms.numel(), dtype=gramian.dtype, device=gramian.device)
        weights = self.function(torch.where(seen, gramian, identity))
        if not isinstance(weights, Tensor) or weights.shape != norms.shape:
            found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"rule must return a tensor of {norms.numel()} weights, got {found} "
                f"from {self.function!r}"
            )
        weights = torch.where(seen, weights.to(norms), 1.0 / norms.numel())
        return Weighting(weights, torch.zeros_like(weights))


def slopes(weighting: Weighting, losses: Tensor) -> Tensor:
    """What each gradient is multiplied by: d(κL + κ_reg L²)/dL = κ + 2 κ_reg L, shape ``(K,)``.

    Source: paper, Algorithm 2, line 11.
    """
    return weighting.weights + 2.0 * weighting.regularization * losses


def _seen(norms: Tensor) -> Tensor:
    """Whether there has been a gradient other than 0."""
    return norms.any()


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and 0.0 < number < float("inf")


def _constants(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor, made on its device without waiting for it."""
    return torch.stack([torch.full_like(like[0], number) for number in numbers])


def _or_0(quotient: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0: a gradient never seen gets no weight."""
    return quotient.masked_fill(denominator == 0, 0.0)
