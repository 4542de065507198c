"""Our bounds beside those of bound-propagation, an independent package that knows dense layers."""

import warnings

import pytest
import torch
from torch import nn

from robust_app.bounds import propagate
from robust_app.interval import Interval
from robust_app.pullback import LinearBound
from robust_app.relaxation import is_relu, lower_bounds
from robust_app.tightening import Problem, tighten

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch.jit, which it compiles functions with
    bound_propagation = pytest.importorskip("bound_propagation")

OUTPUTS = 5


def dense(layers, shape):
    """The same network with each layer between ReLUs as a matrix, and images as vectors."""
    parts = []
    for layer in layers:
        x = torch.zeros(1, *shape, dtype=torch.float64)
        if is_relu(layer):
            parts.append(nn.ReLU())
            continue
        with torch.no_grad():
            outputs = layer(x)
            size = outputs.numel()
            affine = nn.Linear(x.numel(), size).double()
            jacobian = torch.autograd.functional.jacobian(layer, x)
            affine.weight.copy_(jacobian.reshape(size, -1))
            affine.bias.copy_(outputs.flatten())
        shape = outputs.shape[1:]
        parts.append(affine)
    return nn.Sequential(*parts)


def networks():
    for seed in range(3):
        torch.manual_seed(seed)
        yield (
            (6,),
            nn.Sequential(
                nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, OUTPUTS)
            ).double(),
        )
        yield (
            (2, 6, 5),
            nn.Sequential(
                nn.Conv2d(2, 3, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(3, 4, 2, padding=1),
                nn.ReLU(),
                nn.Sequential(nn.Flatten(), nn.Linear(64, OUTPUTS)),
            ).double(),
        )


def ours(trace, count):
    """Lower and upper bounds of each output."""
    one_hot = torch.eye(OUTPUTS, dtype=torch.float64).expand(count, -1, -1)
    zero = torch.zeros(count, OUTPUTS, dtype=torch.float64)
    lower = lower_bounds(trace, LinearBound(one_hot, zero))
    return lower, -lower_bounds(trace, LinearBound(-one_hot, zero))


@pytest.mark.parametrize(("shape", "network"), list(networks()))
def test_bounds_are_those_of_the_peer(shape, network, monkeypatch):
    torch.manual_seed(0)
    # Theirs are of real numbers.
    monkeypatch.setattr("robust_app.rounding.UNITS", {torch.float64: 0.0})
    x, epsilon = 0.2 + 0.6 * torch.rand(4, *shape, dtype=torch.float64), 0.1
    box, labels = Interval.around(x, epsilon), torch.zeros(4, dtype=torch.int64)
    # Its adaptive lower slopes are ours; by default it takes the chord's.
    peer = bound_propagation.BoundModelFactory(adaptive_relu=True).build(dense(network, shape))
    region = bound_propagation.HyperRectangle.from_eps(x.flatten(1), epsilon)
    with torch.no_grad():
        output = propagate(network, box)
        theirs = peer.ibp(region)
        torch.testing.assert_close((output.lower, output.upper), (theirs.lower, theirs.upper))

        start = Problem.of(network, box, labels)
        theirs = peer.crown_ibp(region).concretize()
        torch.testing.assert_close(ours(start.trace, 4), (theirs.lower, theirs.upper))

        tight = tighten(start)
        theirs = peer.crown(region).concretize()
        torch.testing.assert_close(ours(tight.trace, 4), (theirs.lower, theirs.upper))
