"""The losses of one batch (paper, section 3): what any of them is evaluated through."""

from torch import Tensor, nn
from torch.nn import functional as F

from robust_app.bounds import margin_bounds
from robust_app.interval import Interval


def certified_loss(
    network: nn.Module, x: Tensor, labels: Tensor, epsilon: float | Tensor
) -> Tensor:
    """Cross entropy of the worst margins, an upper bound of the robust loss.

    Args:
        network: layers that :func:`robust_app.bounds.propagate` knows.
        x: images in [0, 1], ``(batch, ...)``.
        labels: true classes, int64 ``(batch,)``.
        epsilon: radius ≥ 0 in pixels of [0, 1].

    Returns:
        0-dim tensor, mean over the batch.

    Raises:
        UnsupportedLayer: if a layer has no rule.

    Source: paper, equation 2, 𝓛(-m(x, ε), y).
    """
    return F.cross_entropy(-margin_bounds(network, Interval.around(x, epsilon), labels), labels)


class Objective(nn.Module):
    """A network's losses behind one ``forward``.

    ``DistributedDataParallel`` averages the gradients of what passes through the ``forward`` of
    the module that it wraps, and of nothing else; so every loss is computed in here.

    Args:
        network: from images ``(batch, C, H, W)`` in [0, 1] to logits ``(batch, classes)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, labels: Tensor, epsilon: Tensor | None = None) -> Tensor:
        """Cross entropy at ``x``, or over the ball of radius ``epsilon`` around it.

        Args:
            x: images, clean or adversarial, ``(batch, ...)``.
            labels: true classes, int64 ``(batch,)``.
            epsilon: radius of the certified loss, 0-dim; None for the loss at ``x`` itself.

        Returns:
            0-dim tensor, mean over the batch.
        """
        if epsilon is None:
            return F.cross_entropy(self.network(x), labels)
        return certified_loss(self.network, x, labels, epsilon)
