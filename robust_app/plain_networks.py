"""Networks of which certificates are: layers that compute what their type does, in float32.

Their copies in float64 hold the same numbers: bounds are of these.
"""

import copy
from collections.abc import Iterator
from itertools import chain
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from robust_app.bounds import propagate
from robust_app.errors import UserError
from robust_app.layer_rules import numbers_of, overridden, rule_owner


def in_float64(network: nn.Module) -> nn.Module:
    """A copy with the same numbers in float64, also those that layers keep as Python's floats.

    Raises:
        UserError: some are narrower than float32, which the bounds of rounding are not for, or of
            two types; or a layer has hooks, parametrizations, or a method or number of its own, and
            may compute anything.

    >>> in_float64(nn.LeakyReLU(0.1)).negative_slope  # as float32 has it
    0.10000000149011612
    """
    _check_plain(network)
    float32 = _is_float32(network)
    exact = copy.deepcopy(network).double()
    if float32:
        for layer in exact.modules():
            for name, value in vars(layer).items():
                if isinstance(value, Real) and value != (rounded := _in_float32(value)):
                    setattr(layer, name, rounded)
    return exact


def _in_float32(number: Real) -> Real | float:
    """As float32 has it; integers stay such, and where they are no plain ones or huge, the same."""
    if isinstance(number, int):
        plain = type(number) is int and abs(number) < 2**100
        return int(torch.tensor(float(number), dtype=torch.float32).item()) if plain else number
    if isinstance(number, Integral):
        return number
    return torch.tensor(float(number), dtype=torch.float32).item()


def as_network(x: Tensor, network: nn.Module) -> Tensor:
    """Images in the type of the network's numbers, if these are the same images.

    Raises:
        TypeError: x is no tensor.
        UserError: x is in another type than float32 or, where a network has no parameters, float64;
            or the network is.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor of images, found {type(x).__name__}")
    if not _is_float32(network):
        return x.double()
    has_parameters = next(network.parameters(), None) is not None
    allowed = (torch.float32,) if has_parameters else (torch.float32, torch.float64)
    if x.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise UserError(f"x: expected {expected} as the network is, found {x.dtype}")
    return x


def _is_float32(network: nn.Module) -> bool:
    """Whether its numbers are float32, not float64; of a network without any, true."""
    kinds = {
        tensor.dtype: name
        for name, tensor in chain(network.named_parameters(), network.named_buffers())
        if tensor.is_floating_point()
    }
    for dtype in kinds.keys() - {torch.float32, torch.float64}:
        raise UserError(
            f"network: certificates are of networks in float32, found {kinds[dtype]} in {dtype}"
        )
    if len(kinds) > 1:
        found = " and ".join(f"{name} in {dtype}" for dtype, name in kinds.items())
        raise UserError(f"network: expected numbers of one type, found {found}")
    return torch.float64 not in kinds


def _check_plain(network: nn.Module) -> None:
    """Refuse what makes a layer compute something else than its type does."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        raise UserError("certificates are without hooks for all modules; remove them first")
    for name, layer in network.named_modules():
        for what in _additions(layer):
            raise UserError(
                f"network: certificates are of layers that compute what their type does, found "
                f"{what} on {name or 'the network'}; remove them first"
            )


def _additions(layer: nn.Module) -> Iterator[str]:
    """What a layer has that its type does not, in words."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, kind) for kind in hooks):
        yield "hooks"
    if is_parametrized(layer):
        yield "parametrizations"
    if layer._compiled_call_impl is not None:
        yield "what .compile() made"
    kind = rule_owner(propagate, layer)
    tensors = [name for name in numbers_of(kind) if isinstance(vars(layer).get(name), Tensor)]
    if tensors:
        yield f"tensors that are neither parameters nor buffers ({', '.join(sorted(tensors))})"
    if kind is not object and (own := overridden(layer, kind)):
        yield f"members of its own ({', '.join(sorted(own))})"
