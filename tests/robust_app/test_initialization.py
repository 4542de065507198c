import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.initialization import ibp_initialization
from robust_app.interval import Interval
from robust_app.margins import layer_inputs
from robust_app.models import build


def initialized(network, seed=0):
    torch.manual_seed(seed)
    ibp_initialization(network)
    return network


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(300, 200), 300),
        (nn.Conv2d(8, 512, 3), 8 * 9),
        (nn.Conv2d(8, 512, (5, 3), groups=4), 2 * 15),
    ],
    ids=str,
)
def test_weights_are_normal_with_the_papers_deviation(layer, fan_in):
    count = layer.weight.numel()
    initialized(nn.Sequential(layer, nn.Linear(1, 1)))
    std = math.sqrt(2 * math.pi) / fan_in
    weight = layer.weight.detach() / std
    # five standard deviations of each estimate: 1/√n, 1/√(2n), and √(p(1-p)/n) < 1/(2√n)
    assert abs(weight.mean()) < 5 / math.sqrt(count)
    assert abs(weight.std() - 1) < 5 / math.sqrt(2 * count)
    within_one = math.erf(math.sqrt(0.5))
    assert abs((weight.abs() < 1).float().mean() - within_one) < 2.5 / math.sqrt(count)


def test_the_last_layer_and_all_biases_are_left_alone():
    network = build("digits-cnn", (1, 8, 8), 10, batch_norm=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    initialized(network)
    changed = {
        name for name, value in network.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"0.weight", "2.weight", "5.weight"}


def test_batch_norm_is_left_alone():
    network = initialized(build("digits-cnn", (1, 8, 8), 10, batch_norm=True))
    assert torch.equal(network[1].weight, torch.ones(16))


def test_the_same_seed_gives_the_same_weights():
    weights = [
        nn.utils.parameters_to_vector(
            initialized(build("digits-cnn", (1, 8, 8), 10), seed).parameters()
        )[:144]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_mean_radii_stay_as_they_are_from_relu_to_relu(seed):
    width, examples = 500, 4
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.zeros_(layer.bias)
    network = initialized(nn.Sequential(*layers, nn.Linear(width, 1)), seed)
    x = torch.rand(examples, width)
    with torch.no_grad():
        boxes = layer_inputs(network, Interval(x, torch.full_like(x, 0.02)))
        radii = [box.radius.mean() for layer, box in boxes if isinstance(layer, nn.ReLU)]
    # Before the first ReLU the sums of |w| alone matter: 2 each on average, with a deviation of
    # √(2π - 4)/√width in each of width sums.
    assert abs(radii[0] / 0.02 - 2) < 5 * math.sqrt(2 * math.pi - 4) / width
    # A ReLU leaves each of width radii a share in [0, 1], ½ on average, of deviation ≤ ½; its
    # mean deviates by ≤ ½/√width, which the next layer doubles.
    for before, after in pairwise(radii):
        assert abs(after / before - 1) < 5 / math.sqrt(width)
