"""BatchNorm for certified training: the clean images' statistics, in every pass of a step.

Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", section 4.1. Once
trained, :func:`robust_app.folding.fold` leaves a network without BatchNorm that computes the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn

from mogd.parallel import world_size
from robust_app.distributed import of_all_processes
from robust_app.precision import at_least_float32

_NO_STATISTICS = (
    "BatchNorm in training mode has no statistics to normalise by: enter"
    " robust_app.batch_norm.clean_statistics(network, x) first, or call .eval() on the network"
)


class BatchNorm(nn.Module):
    """``weight * (x - mean) / sqrt(variance + eps) + bias`` per channel.

    In evaluation the statistics are ``running_mean`` and ``running_var``, which only
    :func:`estimate` sets. In training they are those of the clean batch of
    :func:`clean_statistics`, outside of which there are none, unless they are frozen.

    Args:
        channels: C, at least 1.
        eps: added to the variance, above 0.

    Attributes:
        statistics_frozen: normalise by the running statistics in training too, and leave them as
            they are; ``weight`` and ``bias`` train on.

    Shape:
        ``(batch, C)`` or ``(batch, C, H, W)`` to the same.

    >>> BatchNorm(2, eps=3.0).eval()(torch.tensor([[0.0, 1.0]])).detach()  # variance 1
    tensor([[0.0000, 0.5000]])
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.statistics_frozen = False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._kept: tuple[Tensor, Tensor] | None = None
        self._keeps_its_batch = False

    @property
    def has_statistics(self) -> bool:
        """Whether there are statistics to normalise by: in evaluation, and frozen, always."""
        return self._kept is not None or self.statistics_frozen or not self.training

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The layer as ``scale * x + shift``, each ``(C,)``.

        Raises:
            RuntimeError: in training outside of :func:`clean_statistics`, if not frozen.
        """
        if not self.has_statistics:
            raise RuntimeError(_NO_STATISTICS)
        return self._affine(*(self._kept or (self.running_mean, self.running_var)))

    def running_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The layer as it is in evaluation, whatever its mode, like :meth:`scale_and_shift`."""
        return self._affine(self.running_mean, self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``.

        Raises:
            RuntimeError: see :meth:`scale_and_shift`.
            ValueError: ``x`` has another shape, or a clean batch one value per channel.
        """
        channels = len(self.weight)
        if x.ndim not in (2, 4) or x.shape[1] != channels:
            raise ValueError(
                f"x: expected shape (batch, {channels}) or (batch, {channels}, H, W),"
                f" got {tuple(x.shape)}"
            )
        if self._keeps_its_batch:
            self._kept = _batch_statistics(x)
        per_channel = (-1, *[1] * (x.ndim - 2))
        scale, shift = (values.view(per_channel) for values in self.scale_and_shift())
        return torch.addcmul(shift, x, scale)

    def extra_repr(self) -> str:
        """What ``print(network)`` shows."""
        return f"{len(self.weight)}, eps={self.eps}"

    def _affine(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return scale, self.bias - mean * scale


@contextmanager
def clean_statistics(network: nn.Module, x: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Normalise by the statistics of the batch ``x`` in every pass inside the ``with``.

    The network runs once on ``x``, each BatchNorm layer keeping the mean and the (biased)
    variance of what it sees; gradients flow through both. Attacks, adversarial passes and bounds
    inside the ``with`` use them, after which they are forgotten. Among several processes the
    statistics are those of the whole batch, and the gradients averaged by
    ``DistributedDataParallel`` those of one process, if every process has a share of one size.

    Args:
        network: with or without BatchNorm layers, in training or evaluation.
        x: clean images, ``(batch, ...)``.

    Yields:
        ``logits()``, the network's output at ``x``: that of the pass above, or where no BatchNorm
        layer is in training mode and not frozen, of a pass made when it is first called.

    Raises:
        ValueError: the batch has only one value per channel at some layer.

    >>> network = nn.Sequential(BatchNorm(1, eps=1e-9))
    >>> with torch.no_grad(), clean_statistics(network, torch.tensor([[1.0], [3.0]])) as logits:
    ...     print(logits().flatten(), network(torch.tensor([[2.0]])))
    tensor([-1.,  1.]) tensor([[0.]])
    """
    layers = [
        layer for layer in batch_norms(network) if layer.training and not layer.statistics_frozen
    ]
    logits = cache(partial(network, x))
    try:
        if layers:
            with _keeping(layers):
                logits()
        yield logits
    finally:
        _forget(layers)


@torch.no_grad()
def estimate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics to the means of the batches' means and biased variances.

    Each layer normalises by its batch's own statistics, as in training. Batches weigh as many
    images as they hold. All processes must call this together, each with its share of each batch.

    Args:
        network: any; without BatchNorm layers that are not frozen nothing happens. Its mode is
            left as it was.
        batches: clean images, ``(batch, ...)`` each.

    Raises:
        ValueError: there are no batches, or see :func:`clean_statistics`.

    >>> network = nn.Sequential(BatchNorm(1))
    >>> estimate(network, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [5.0]])])
    >>> network[0].running_mean, network[0].running_var
    (tensor([3.5000]), tensor([0.5000]))
    """
    layers = [layer for layer in batch_norms(network) if not layer.statistics_frozen]
    if not layers:
        return
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    images = 0
    try:
        with _keeping(layers):
            for x in batches:
                network(x)
                images += len(x)
                for layer in layers:
                    assert layer._kept is not None
                    mean, variance = layer._kept
                    layer.running_mean.lerp_(mean, len(x) / images)
                    layer.running_var.lerp_(variance, len(x) / images)
    finally:
        _forget(layers)
        for module, training in modes:
            module.training = training
    if images == 0:
        raise ValueError("batches: expected at least one image, got none")


def freeze_first(network: nn.Module, frozen: bool) -> None:
    """Let the first BatchNorm layer keep its running statistics, or not; see :class:`BatchNorm`.

    A network that is certified in a large ball tells bright pixels from dark ones by a threshold
    in its first layer. Statistics of single batches shift it, and where the shift lets the dark
    ones through, the gradient of the certified loss is up to hundreds of times as long as usual.
    With this layer's statistics kept, the others' make no such gradient, and the hidden layer needs
    them of the batch (docs/results/what-we-tried.md).

    Args:
        network: any; without BatchNorm layers nothing happens.
        frozen: whether to keep them.
    """
    for layer in batch_norms(network)[:1]:
        layer.statistics_frozen = frozen


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, over the batches of all processes."""
    if x[:, 0].numel() * world_size() < 2:
        raise ValueError(f"a clean batch needs more than one value per channel, got {x.shape}")
    # In float32 at least, also where autocast has made x a half.
    x = at_least_float32(x)
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    if world_size() == 1:
        return mean, variance
    means, variances = of_all_processes(torch.stack([mean, variance])).unbind(1)
    whole = means.mean(0)
    # Not the mean of squares less the square of the mean, whose digits cancel.
    return whole, (variances + (means - whole).square()).mean(0)


def batch_norms(network: nn.Module) -> list[BatchNorm]:
    """The layers of this kind, wherever they are."""
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


@contextmanager
def _keeping(layers: Sequence[BatchNorm]) -> Iterator[None]:
    """Let each layer take and keep the statistics of the batch that it sees."""
    for layer in layers:
        layer._keeps_its_batch = True
    try:
        yield
    finally:
        for layer in layers:
            layer._keeps_its_batch = False


def _forget(layers: Sequence[BatchNorm]) -> None:
    for layer in layers:
        layer._kept = None
