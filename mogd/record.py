"""What one step saw and decided."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """What one ``backward`` saw and decided; detached tensors on the parameters' device.

    Attributes:
        losses: this batch's losses, averaged over processes, shape ``(K,)``.
        weights: κ, from past gradients alone, shape ``(K,)``.
        regularization: κ_reg, the weight of each squared loss, shape ``(K,)``.
        gramian: inner products of the moments behind the weights, shape ``(K, K)``.
        norms: moments of the gradients' norms behind the weights, shape ``(K,)``.
        conflict: whether two moments disagreed (:func:`mogd.rules.conflicting`), 0-dim bool.
        prioritized: index of the loss that the priority favoured, 0-dim integer.
    """

    losses: Tensor
    weights: Tensor
    regularization: Tensor
    gramian: Tensor
    norms: Tensor
    conflict: Tensor
    prioritized: Tensor
