"""BatchNorm merged into the layers before it: for good, or for as long as a step lasts."""

import copy
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from robust_app.batch_norm import BatchNorm, batch_norms
from robust_app.layer_rules import is_plainly
from robust_app.precision import InFloat32


@torch.no_grad()
def fold(network: nn.Sequential) -> nn.Sequential:
    """A copy that computes what ``network`` does in evaluation, without BatchNorm layers.

    Each is merged into the Conv2d or Linear layer before it.

    Args:
        network: layers in a row, any number of BatchNorm layers among them.

    Raises:
        ValueError: a BatchNorm layer is elsewhere.

    >>> fold(nn.Sequential(nn.Linear(3, 2, bias=False), BatchNorm(2), nn.ReLU()))
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): ReLU()
    )
    """
    layers = _merged(network, BatchNorm.running_scale_and_shift)
    before = "nothing"
    for layer in layers:
        name = type(layer).__name__
        if batch_norms(layer):
            found = before if isinstance(layer, BatchNorm) else f"something inside {name}"
            raise ValueError(
                "network: expected each BatchNorm to follow a Conv2d or Linear layer, "
                f"found {found}"
            )
        before = name
    folded = nn.Sequential(*map(_owning, layers))
    folded.training = network.training
    return folded


def merged(network: nn.Module) -> nn.Module:
    """The network with its BatchNorm layers merged into the layers before them, for this step.

    It computes the same from the same parameters, to which gradients flow, by the statistics in
    force now, with no pass over activations beside those of the other layers: to be made, and
    used, inside :func:`~robust_app.batch_norm.clean_statistics`. Rounding differs: where products
    are taken in bf16, the merged weights and shifts are rounded too. A layer
    :class:`~robust_app.precision.InFloat32` stays one.

    Args:
        network: layers in a row, or anything else, which is returned as it is. BatchNorm layers
            that follow neither Conv2d nor Linear stay.

    Raises:
        RuntimeError: a BatchNorm layer is in training mode and has no statistics.

    >>> network = nn.Sequential(nn.Linear(1, 1), BatchNorm(1), nn.ReLU()).eval()
    >>> merged(network)
    Sequential(
      (0): Linear(in_features=1, out_features=1, bias=True)
      (1): ReLU()
    )
    """
    if not is_plainly(network, nn.Sequential) or not batch_norms(network):
        return network
    return nn.Sequential(*_merged(network, BatchNorm.scale_and_shift))


def _merged(
    network: nn.Sequential, statistics: Callable[[BatchNorm], tuple[Tensor, Tensor]]
) -> list[nn.Module]:
    """The layers; each BatchNorm that follows an affine layer made one with it."""
    layers: list[nn.Module] = []
    for layer in network:
        before = layers[-1] if layers else None
        affine = before.layer if isinstance(before, InFloat32) else before
        if isinstance(layer, BatchNorm) and _is_affine(affine):
            scaled = _scaled(affine, *statistics(layer))
            layers[-1] = scaled if affine is before else InFloat32(scaled)
        else:
            layers.append(layer)
    return layers


def _is_affine(layer: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    if layer is None or is_parametrized(layer):
        return False
    return is_plainly(layer, nn.Conv2d) or is_plainly(layer, nn.Linear)


def _scaled(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> nn.Module:
    """``scale * layer(x) + shift`` per channel, as a layer with tensors in place of parameters."""
    if layer.bias is not None:
        shift = shift + scale * layer.bias
    like = copy.copy(layer)
    like._parameters = {}  # the copy would share them, and what is set below would be refused
    like.weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    like.bias = shift
    return like


def _owning(layer: nn.Module) -> nn.Module:
    """A copy with parameters of its own, also where :func:`_scaled` has left tensors."""
    owned = copy.deepcopy(layer)
    for name in ("weight", "bias"):
        tensor = vars(owned).get(name)
        if isinstance(tensor, Tensor):
            setattr(owned, name, nn.Parameter(tensor))
    return owned
