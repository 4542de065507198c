"""The certified loss of a batch (paper, section 3), and what any loss is evaluated through."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_app.crown_margins import crown_margins
from robust_app.interval import Interval
from robust_app.margins import layer_inputs, margins_after
from robust_app.regularizers import regularization


def certified_loss(
    network: nn.Module,
    box: Interval,
    labels: Tensor,
    *,
    crown_share: float | Tensor = 0.0,
    box_regularizers: float | Tensor = 0.0,
    weight: float | Tensor = 1.0,
) -> Tensor:
    """Cross entropy of the worst margins, an upper bound of the robust loss, and regularisers.

    Args:
        network: layers that :func:`robust_app.bounds.propagate` knows.
        box: of inputs, ``(batch, ...)``; of images, as of :meth:`Interval.around`.
        labels: true classes, int64 ``(batch,)``.
        crown_share: β in [0, 1] of m = (1 - β) m_IBP + β m_CROWN-IBP (Zhang et al.).
        box_regularizers: weight ≥ 0 of :func:`~robust_app.regularizers.regularization`.
        weight: ≥ 0, of the cross entropy alone.

    The last three are numbers or 0-dim tensors. The value of a tensor is not looked at: only the
    number 0 leaves a part out.

    Returns:
        0-dim tensor, mean over the batch.

    Raises:
        UnsupportedLayer: if a layer has no rule.

    Source: paper, equation 2, 𝓛(-m(x, ε), y).
    """
    inputs = list(layer_inputs(network, box))
    margins = margins_after(*inputs[-1], labels)
    if isinstance(crown_share, Tensor) or crown_share > 0:
        margins = torch.lerp(margins, crown_margins(inputs, labels), crown_share)
    loss = weight * F.cross_entropy(-margins, labels)
    if isinstance(box_regularizers, Tensor) or box_regularizers > 0:
        loss = loss + box_regularizers * regularization(inputs)
    return loss


class Objective(nn.Module):
    """A network whose losses all go through one ``forward``.

    ``DistributedDataParallel`` averages the gradients of what passes through the ``forward`` of
    the module that it wraps, and of nothing else; so every loss is computed in here.

    Args:
        network: what the losses are of.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, loss: Callable[[nn.Module], Tensor]) -> Tensor:
        """The loss, a 0-dim function of the network, at the network."""
        return loss(self.network)
