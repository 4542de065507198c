import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robust_app.batch_norm import BatchNorm
from robust_app.layerwise import split
from robust_app.learning_rates import parameter_groups
from robust_app.reporting import Silent
from robust_app.training import Trainer
from tests.robust_app.runs import ALONE, SHI, assert_same_files, few_digits, full_strength, trained

BY_HAND = [  # each layer's inputs to a unit
    (nn.Linear(300, 20), 300),
    (nn.Conv2d(8, 16, 3), 8 * 9),
    (nn.Conv2d(8, 16, (5, 3), groups=4), 2 * 15),
]


def multipliers(network, reference):
    """Of each parameter, by identity."""
    return {
        id(parameter): group["multiplier"]
        for group in parameter_groups(network, reference)
        for parameter in group["params"]
    }


@pytest.mark.parametrize(("layer", "fan_in"), BY_HAND, ids=str)
def test_weights_have_the_reference_by_their_fan_in_and_all_else_one(layer, fan_in):
    first, norm = nn.Linear(7, 5), BatchNorm(3)
    found = multipliers(nn.Sequential(first, norm, nn.ReLU(), layer), 120.0)
    assert found.pop(id(first.weight)) == 120 / 7
    assert found.pop(id(layer.weight)) == 120 / fan_in
    others = [first.bias, *norm.parameters(), layer.bias]
    assert found == {id(parameter): 1.0 for parameter in others}


def test_without_a_reference_all_are_one_group_in_order():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    (group,) = parameter_groups(network, 0.0)
    assert group["multiplier"] == 1.0
    assert list(map(id, group["params"])) == list(map(id, network.parameters()))


@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=5), reference=st.floats(0, 1e4))
def test_every_parameter_is_in_one_group(widths, reference):
    network = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(widths)))
    groups = parameter_groups(network, reference)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, network.parameters()))
    assert len({group["multiplier"] for group in groups}) == len(groups)


def test_a_weight_of_two_layers_is_in_one_group():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    weight, biases = parameter_groups(nn.Sequential(one, other), 8.0)
    assert (len(weight["params"]), weight["multiplier"]) == (1, 2.0)
    assert (len(biases["params"]), biases["multiplier"]) == (2, 1.0)


@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["", "after a divergence"])
@pytest.mark.parametrize("method", ["ibp", "advibp"])
def test_a_first_step_of_adam_moves_each_weight_by_its_learning_rate(method, scale):
    config = full_strength(method, batch_size=len(few_digits().x_train), reference_fan_in=30.0)
    trainer = Trainer(dataclasses.replace(config, held_out=0), few_digits(), ALONE)
    trainer.learning_rate_scale = scale
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.train_epoch(Silent())
    layers = [layer for layer in trainer.network if isinstance(layer, nn.Conv2d | nn.Linear)]
    factors = [factor for each in layers for factor in (30 / each.weight[0].numel(), 1.0)]
    after = trainer.network.parameters()
    for new, old, factor in zip(after, before, factors, strict=True):
        moved = (new.detach() - old).abs()[new.grad.abs() > 1e-4]  # Adam's eps is 1e-8
        assert len(moved) > 0
        torch.testing.assert_close(
            moved, torch.full_like(moved, scale * 1e-3 * factor), rtol=1e-2, atol=2e-7
        )


def test_layer_wise_stages_have_their_learning_rate_everywhere():
    config = full_strength("advibp", epochs=1, stages=1, reference_fan_in=30.0)
    trainer = Trainer(config, few_digits(), ALONE)
    assert len(trainer.optimizer.param_groups) > 1
    trainer.begin_stage(1)
    (group,) = trainer.optimizer.param_groups
    assert group["multiplier"] == 1.0
    _, later = split(trainer.network, 1)
    assert list(map(id, group["params"])) == list(map(id, later.parameters()))


def test_a_run_by_fan_in_resumes_to_the_bits_of_an_unbroken_one(tmp_path):
    config = full_strength("advibp", epochs=3, reference_fan_in=30.0, **SHI)
    trained(config, tmp_path / "unbroken")
    trained(config, tmp_path / "resumed", stops=(1, 3))
    assert_same_files(tmp_path / "unbroken", tmp_path / "resumed")
