"""From the Gramian of the moments to the weights of the losses.

A rule never sees a gradient: all it knows are the inner products and the norm moments. The
paper's own is in :mod:`mogd.bisector_projection`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Complex, Real
from typing import Any, ClassVar, NamedTuple

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
    """A map from the moments of K losses, and the index of the favoured one, to weights.

    Attributes:
        needs_past: whether the weights come from the past. Before there has been any gradient,
            what such a rule answers is not used: the weights are 1/K, without regularisation.
    """

    needs_past: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        """Weigh K losses.

        Args:
            gramian: ⟨mⱼ, mₖ⟩ of the bias-corrected gradient moments, shape ``(K, K)``.
            norms: vₖ, the bias-corrected moments of the gradients' 2-norms, shape ``(K,)``; 0 for
                a loss that has had no gradient, as its row of the Gramian is.
            prioritized: index of the loss to favour in conflict, 0-dim integer tensor.

        Returns:
            Finite weights and regularisation, each of shape ``(K,)``.
        """


def onto_favoured(gramian: Tensor, prioritized: Tensor) -> Tensor:
    """⟨mᵢ, mₖ⟩ of the favoured loss i with each, shape ``(K,)``, without waiting for a GPU."""
    return torch.where(_indices(gramian) == prioritized, gramian, 0.0).sum(1)


def against(gramian: Tensor, prioritized: Tensor) -> Tensor:
    """Which losses j conflict with the favoured one i: ⟨mᵢ, mⱼ⟩ ≤ 0 of two losses, < 0 of more.

    Of two, orthogonal ones conflict, as in the paper. Of more, a loss that has no gradient, or that
    shares no parameter with the favoured one, is not against it.

    Args:
        gramian: inner products of the moments, shape ``(K, K)``.
        prioritized: index i, 0-dim integer tensor.

    Returns:
        Bool tensor, shape ``(K,)``.

    Source: paper, Algorithm 1, line 12; more than two losses are our own.
    """
    products = onto_favoured(gramian, prioritized)
    opposed = products <= 0 if len(products) == 2 else products < 0
    return opposed & (_indices(gramian) != prioritized)


def favoured_with_gradient(norms: Tensor, prioritized: Tensor) -> Tensor:
    """The favoured loss's index, or that of the first loss with a gradient where it has had none.

    Args:
        norms: moments of the norms, shape ``(K,)``; 0 before a loss's first gradient.
        prioritized: index of the favoured loss, 0-dim integer tensor.

    Returns:
        0-dim integer tensor; 0 where no loss has had one.

    >>> favoured_with_gradient(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(0))
    tensor(2)
    """
    seen = norms > 0
    has = ((_indices(norms) == prioritized) & seen).any()
    return torch.where(has, prioritized, seen.byte().argmax())


def conflicting(gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Tensor:
    """Whether any loss that had a gradient conflicts with the favoured one (:func:`against`).

    Args:
        gramian: inner products of the moments, shape ``(K, K)``.
        norms: moments of the norms, shape ``(K,)``; 0 before a loss's first gradient. Such a loss
            conflicts with none, for the paper divides by this number; where it is the favoured one
            of more than two, the first that has had a gradient is in its place.
        prioritized: index of the favoured loss, 0-dim integer tensor; of two losses it does not
            count.

    Returns:
        0-dim bool tensor; False before any gradient.

    >>> moments = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    >>> conflicting(moments @ moments.T, torch.ones(2), prioritized=torch.tensor(0))
    tensor(True)
    """
    if len(norms) == 2:
        return against(gramian, prioritized).any() & norms.all()
    return against(gramian, favoured_with_gradient(norms, prioritized)).any()


@dataclass(frozen=True)
class Constant(Rule):
    """The weighted sum of the losses: the same weights at every step, from the first on.

    Args:
        weights: one finite number a loss; a tensor's are copied.

    Raises:
        ValueError: if ``weights`` is empty or not finite; on use, if K is another.

    Source: paper, equation 5.
    """

    weights: Sequence[float] | Tensor
    needs_past: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given: Any = self.weights.tolist() if isinstance(self.weights, Tensor) else self.weights
        try:
            real = not any(isinstance(each, Complex) > isinstance(each, Real) for each in given)
            weights = torch.as_tensor(given if real else [], dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            weights = torch.tensor(torch.nan)
        if weights.dim() != 1 or weights.numel() == 0 or not weights.isfinite().all():
            raise ValueError(
                f"weights must be one finite number for each loss, got {self.weights!r}"
            )
        object.__setattr__(self, "weights", tuple(weights.tolist()))

    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        if norms.numel() != len(self.weights):
            raise ValueError(
                f"Constant has weights for {len(self.weights)} losses, got {norms.numel()} losses"
            )
        assert not isinstance(self.weights, Tensor)  # but a tuple, since it was made
        weights = constants(self.weights, norms)
        return Weighting(weights, torch.zeros_like(weights))


@dataclass(frozen=True)
class GramianRule(Rule):
    """Any function from a Gramian to weights, a weighting of another library for instance.

    ``UnbiasedMultiGradient`` wraps a plain callable in this. The function gets the Gramian of the
    moments, shape ``(K, K)``, instead of this batch's, so its weights become unbiased; before any
    gradient has been seen it gets the identity.

    Raises:
        ValueError: on use, if the function returns anything but K weights.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        identity = torch.eye(norms.numel(), dtype=gramian.dtype, device=gramian.device)
        weights = self.function(torch.where(norms.any(), gramian, identity))
        real = isinstance(weights, Tensor) and not weights.is_complex()
        if not real or weights.shape != norms.shape:
            found = tuple(weights.shape) if real else _kind(weights)
            raise ValueError(
                f"rule must return a tensor of {norms.numel()} weights, got {found} "
                f"from {self.function!r}"
            )
        return Weighting(weights.to(norms), torch.zeros_like(norms))


def checked(weighting: Weighting, losses: int, rule: Rule) -> Weighting:
    """What a rule answered, without its graph, after checking that it is for K losses.

    Raises:
        TypeError: if it is not two tensors.
        ValueError: if one is not of shape ``(K,)``.
    """
    found: Any = weighting
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"rule must return a Weighting, got {type(found).__name__} from {rule!r}")
    for name, part in zip(Weighting._fields, found, strict=True):
        if not isinstance(part, Tensor) or part.is_complex():
            raise TypeError(
                f"rule must return {name} as a real tensor, got {_kind(part)} from {rule!r}"
            )
        if part.shape != (losses,):
            raise ValueError(
                f"rule must return {name} of shape ({losses},), got {tuple(part.shape)} "
                f"from {rule!r}"
            )
    return Weighting(*(part.detach() for part in found))


def from_past(weighting: Weighting, norms: Tensor) -> Weighting:
    """The weighting, or 1/K without regularisation where there has been no gradient other than 0.

    Args:
        weighting: of K losses.
        norms: moments of the norms, shape ``(K,)``.

    >>> nothing = Weighting(torch.full((2,), torch.nan), torch.zeros(2))
    >>> from_past(nothing, torch.zeros(2)).weights
    tensor([0.5000, 0.5000])
    """
    seen = norms.any()
    weights = torch.where(seen, weighting.weights, 1.0 / norms.numel())
    return Weighting(weights, torch.where(seen, weighting.regularization, 0.0))


def slopes(weighting: Weighting, losses: Tensor) -> Tensor:
    """What each gradient is multiplied by: d(κL + κ_reg L²)/dL = κ + 2 κ_reg L, shape ``(K,)``.

    Source: paper, Algorithm 2, line 11.
    """
    return weighting.weights + 2.0 * weighting.regularization * losses


def constants(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor, made on its device without waiting for it."""
    return torch.stack([torch.full_like(like[0], number) for number in numbers])


def _kind(answer: object) -> str:
    return str(answer.dtype) if isinstance(answer, Tensor) else type(answer).__name__


def _indices(of_losses: Tensor) -> Tensor:
    return torch.arange(len(of_losses), device=of_losses.device)
