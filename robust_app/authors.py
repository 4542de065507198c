"""The weights as the authors' released code computes them, where it differs from the paper.

They serve to reproduce that code's runs; :class:`mogd.BisectorProjection` is the paper's rule.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mogd import BisectorProjection, Rule, Weighting
from mogd.rules import conflicting


@dataclass(frozen=True)
class AuthorsWeights(Rule):
    """The paper's rule with the code's two changes.

    In agreement both weights are multiplied by v₁, so that κ = (γ, γ v₁/v₂); in conflict κ_reg
    is in force whichever loss is favoured.

    Args:
        regularization: κ_reg, at least 0.
    """

    regularization: float = 0.5

    def __call__(self, gramian: Tensor, norms: Tensor, prioritized: Tensor) -> Weighting:
        """Weights of the adversarial and the certified loss, in this order.

        >>> gramian, first = torch.tensor([[4.0, 2.0], [2.0, 1.0]]), torch.tensor(0)
        >>> AuthorsWeights()(gramian, torch.tensor([2.0, 1.0]), first).weights
        tensor([0.7500, 1.5000])
        """
        paper = BisectorProjection(self.regularization)(gramian, norms, prioritized)
        conflict = conflicting(gramian, norms, prioritized)
        scaled = ~conflict & (norms[0] > 0)  # without a gradient there is no v₁ to scale by
        weights = torch.where(scaled, paper.weights * norms[0], paper.weights)
        certified = torch.arange(2, device=norms.device) == 1
        return Weighting(weights, self.regularization * (conflict & certified).to(norms))
