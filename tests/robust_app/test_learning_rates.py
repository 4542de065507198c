import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robust_app.learning_rates import parameter_groups
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.robust_app.runs import ALONE, SHI, assert_same_files, few_digits, full_strength, trained

BY_HAND = [  # each layer's inputs to a unit
    (nn.Linear(300, 20), 300),
    (nn.Conv2d(8, 16, 3), 8 * 9),
    (nn.Conv2d(8, 16, (5, 3), groups=4), 2 * 15),
]


@pytest.mark.parametrize(("layer", "fan_in"), BY_HAND, ids=str)
def test_weights_have_the_reference_by_their_fan_in_and_biases_one(layer, fan_in):
    weights, biases = parameter_groups(layer, 120.0)
    assert (weights["params"][0] is layer.weight, weights["share"]) == (True, 120 / fan_in)
    assert (biases["params"][0] is layer.bias, biases["share"]) == (True, 1.0)


def test_without_a_reference_all_are_one_group_in_order():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    (group,) = parameter_groups(network, 0.0)
    assert group["share"] == 1.0
    expected = list(network.parameters())
    assert len(group["params"]) == len(expected)
    assert all(one is other for one, other in zip(group["params"], expected, strict=True))


@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    reference=st.floats(0, 1e4),
)
def test_every_parameter_is_in_one_group(widths, reference):
    network = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(widths)))
    groups = parameter_groups(network, reference)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, network.parameters()))
    assert len({group["share"] for group in groups}) == len(groups)


@pytest.mark.parametrize("method", ["ibp", "advibp"])
def test_a_first_step_of_adam_moves_each_weight_by_its_share(method):
    config = full_strength(method, batch_size=few_digits().x_train.shape[0])
    config = dataclasses.replace(config, reference_fan_in=30.0, learning_rate=1e-3, held_out=0)
    trainer = Trainer(config, few_digits(), ALONE)
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.train_epoch(Silent())
    layers = [m for m in trainer.network if isinstance(m, nn.Conv2d | nn.Linear)]
    after = list(trainer.network.parameters())
    expected = [1e-3 * share for layer in layers for share in (30 / layer.weight[0].numel(), 1.0)]
    # Adam's first step is the learning rate, whatever the gradient; but not where that is 0.
    moved = [(new - old).abs().max().item() for new, old in zip(after, before, strict=True)]
    assert moved == pytest.approx(expected, rel=1e-3)


def test_a_run_by_fan_in_resumes_to_the_bits_of_an_unbroken_one(tmp_path):
    config = dataclasses.replace(full_strength("advibp", epochs=3, **SHI), reference_fan_in=30.0)
    trained(config, tmp_path / "unbroken")
    trained(config, tmp_path / "resumed", stops=(1, 3))
    assert_same_files(tmp_path / "unbroken", tmp_path / "resumed")
    plain = trained(dataclasses.replace(config, reference_fan_in=0.0), tmp_path / "plain")
    assert len(plain.optimizer.param_groups) == 1
    rates = [epoch["learning_rate"] for epoch in RunDirectory(tmp_path / "resumed").metrics()]
    assert rates == [epoch["learning_rate"] for epoch in RunDirectory(tmp_path / "plain").metrics()]
