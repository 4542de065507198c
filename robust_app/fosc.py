"""The first-order stationary condition: how strong an adversarial example is (paper, A.3)."""

from dataclasses import dataclass

from torch import Tensor

from mogd import parallel


def fosc(x: Tensor, x_adv: Tensor, gradient: Tensor, epsilon: float | Tensor) -> Tensor:
    """c(x_adv) = ε‖∇‖₁ - ⟨x_adv - x, ∇⟩ of each example; 0 is the strongest attack.

    Args:
        x: clean images, ``(batch, ...)``.
        x_adv: adversarial images within ε of them, same shape.
        gradient: ∇, of each example's own loss at ``x_adv``, same shape.
        epsilon: radius ≥ 0 in pixels of [0, 1]; in a box of hidden values (A.6) its radius, like
            ``x``, which is its centre then.

    Returns:
        Non-negative values up to rounding, shape ``(batch,)``.

    Source: paper, appendix A.3; Wang et al., equation 4.

    >>> x, gradient = torch.zeros(1, 2), torch.tensor([[3.0, -4.0]])
    >>> fosc(x, x + 0.1 * gradient.sign(), gradient, 0.1)
    tensor([0.])
    >>> fosc(x, x, gradient, 0.5)
    tensor([3.5000])
    """
    terms = epsilon * gradient.abs() - (x_adv - x) * gradient
    return terms.flatten(1).sum(1)


@dataclass
class Stationarity:
    """Measures c(x_adv) of the last batch observed, from gradients that exist anyway.

    The backward pass of the adversarial loss also leaves ``x_adv.grad``; this reads it, so the
    oracle ``Threshold(Stationarity(), c_t)`` costs no pass.
    """

    x: Tensor | None = None
    x_adv: Tensor | None = None
    epsilon: float | Tensor = 0.0

    def observe(self, x: Tensor, x_adv: Tensor, epsilon: float | Tensor) -> None:
        """Name the images whose mean loss is about to be differentiated.

        Args:
            x: clean images, ``(batch, ...)``.
            x_adv: adversarial images that require a gradient, same shape.
            epsilon: radius in pixels of [0, 1], 0-dim or like ``x``.
        """
        self.x, self.x_adv, self.epsilon = x, x_adv, epsilon

    def __call__(self, losses: Tensor) -> Tensor:
        """c averaged over the batch, of all processes: 0-dim.

        Raises:
            RuntimeError: if no batch was observed or its gradient was not taken.
        """
        if self.x is None or self.x_adv is None or self.x_adv.grad is None:
            raise RuntimeError(
                "Stationarity needs observe(x, x_adv, epsilon) before, and the adversarial loss's "
                "backward pass after, x_adv.requires_grad_()"
            )
        # The loss is a mean: the gradient of an example's own loss is that of the batch times n.
        gradient = self.x_adv.grad * len(self.x_adv)
        values = fosc(self.x, self.x_adv.detach(), gradient, self.epsilon)
        return parallel.average(values.mean())
