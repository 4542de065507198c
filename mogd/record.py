"""What one step saw and decided."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mogd.rules import Weighting, conflicting, slopes


@dataclass(frozen=True)
class Record:
    """What one ``backward`` saw and decided; detached tensors on the parameters' device.

    Attributes:
        losses: this batch's losses, averaged over processes, shape ``(K,)``.
        weights: κ, from past gradients alone, shape ``(K,)``.
        regularization: κ_reg, the weight of each squared loss, shape ``(K,)``.
        gramian: inner products of the moments behind the weights, shape ``(K, K)``.
        norms: moments of the gradients' norms behind the weights, shape ``(K,)``.
        prioritized: index of the loss that the priority favoured, 0-dim integer; 0 where, on the
            CPU, something was not finite, so that it was not asked.
        finite: whether each loss and its gradient was, for none where only the weighted sum was
            not; the step is taken where all are. Bools, shape ``(K,)``.
    """

    losses: Tensor
    weights: Tensor
    regularization: Tensor
    gramian: Tensor
    norms: Tensor
    prioritized: Tensor
    finite: Tensor

    @property
    def factors(self) -> Tensor:
        """What each loss's gradient was multiplied by, κ + 2 κ_reg L, shape ``(K,)``.

        Source: paper, Algorithm 2, line 11.
        """
        return slopes(Weighting(self.weights, self.regularization), self.losses)

    @property
    def conflict(self) -> Tensor:
        """Whether any loss's moment conflicted with the favoured one's, 0-dim bool.

        Of more than two losses, where that has had no gradient, with the first one's that has.
        See :func:`mogd.rules.conflicting`.
        """
        return conflicting(self.gramian, self.norms, self.prioritized)

    @property
    def cosines(self) -> Tensor:
        """Cosines of the angles between the moments, shape ``(K, K)``, in [-1, 1].

        ⟨mⱼ, mₖ⟩ / (‖mⱼ‖ ‖mₖ‖), and 0 where either moment is 0; so all are 0 at the first step.
        Source: paper, Algorithm 1, line 12, whose test looks at the sign of this alone.
        """
        lengths = self.gramian.diagonal().sqrt()
        products = torch.outer(lengths, lengths)
        return (self.gramian / products).masked_fill(products == 0, 0.0).clamp(-1.0, 1.0)
