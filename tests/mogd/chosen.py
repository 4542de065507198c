"""Losses with chosen gradients, and all that a step may change."""

import copy

import torch
from torch.testing import assert_close

from mogd import UnbiasedMultiGradient

AGREEING = ((3.0, 0.0), (4.0, 3.0))  # κ = (2/3, 2/5) after one step with these gradients
CONFLICTING = ((3.0, 0.0), (-4.0, 3.0))  # κ = (1, 12/25), or (4/3, 1) if the second is favoured


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def parameter(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def linear(p, gradient, value=None):
    """A loss with this gradient and, if given, this value."""
    loss = p @ torch.as_tensor(gradient, dtype=p.dtype)
    return loss if value is None else loss - loss.detach() + value


def optimizer_after(*history, p=None, lr=0.0, **options):
    """An optimizer that has stepped along each of the given tuples of gradients."""
    p = parameter(0.0, 0.0) if p is None else p
    optimizer = UnbiasedMultiGradient([p], lr=lr, **options)
    for gradients in history:
        optimizer.backward([linear(p, gradient) for gradient in gradients])
        optimizer.step()
    return p, optimizer


def weights_next(optimizer, *gradients):
    """The weights of the next step, whatever its gradients."""
    p = optimizer.param_groups[0]["params"][0]
    return optimizer.backward([linear(p, g) for g in gradients or AGREEING]).weights


def snapshot(optimizer):
    """Copies of the parameters, the moments and the state of the base."""
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    return copy.deepcopy({"parameters": parameters, **state})


def assert_same_bits(found, expected):
    assert_close(found, expected, rtol=0, atol=0)
