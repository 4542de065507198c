"""A network in two parts, and training in layer-wise stages (A.6)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robust_app import checkpoint, models
from robust_app.batch_norm import BatchNorm
from robust_app.config import Config
from robust_app.errors import UserError
from robust_app.layers import Normalize
from robust_app.layerwise import split, trainable_layers
from robust_app.loading import load_network
from robust_app.reporting import Silent
from robust_app.run_directory import RunDirectory
from robust_app.session import run
from robust_app.training import Trainer
from tests.robust_app.runs import (
    ALONE,
    SHI,
    assert_same_files,
    few_digits,
    full_strength,
    trained,
)

NAMES = ("digits-cnn", "dm-small", "cnn-small")


def network(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return models.build(name, (1, 10, 10), classes=3, mean=[0.5], std=[0.5])


@given(st.sampled_from(NAMES), st.data())
def test_the_parts_one_after_the_other_are_the_network(name, data):
    whole = network(name)
    stage = data.draw(st.integers(0, len(trainable_layers(whole)) - 1))
    before, after = split(whole, stage)
    x = torch.rand(2, 1, 10, 10)
    assert torch.equal(after(before(x)), whole(x))
    assert len(trainable_layers(before)) == stage
    assert isinstance(after[0], nn.Conv2d | nn.Linear | Normalize)
    pairs = zip([*before.parameters(), *after.parameters()], whole.parameters(), strict=True)
    assert all(one is other for one, other in pairs)  # shared, not copied


def test_stage_zero_trains_all_layers_the_normalisation_included():
    whole = network("digits-cnn")
    before, after = split(whole, 0)
    assert len(before) == 0
    assert [type(layer) for layer in after] == [type(layer) for layer in whole]
    # Later stages begin with a layer that trains: what precedes it is in the frozen part.
    before, after = split(whole, 1)
    kinds = [type(layer).__name__ for layer in before]
    assert kinds == ["Normalize", "Conv2d", "ReLU"]
    assert isinstance(after[0], nn.Conv2d)


def test_nested_sequentials_are_unrolled():
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 2))
    assert trainable_layers(nested) == [0, 2]
    before, after = split(nested, 1)
    assert (len(before), len(after)) == (2, 1)


@pytest.mark.parametrize("stage", [-1, 4, 5])
def test_a_stage_that_leaves_nothing_to_train_is_refused(stage):
    with pytest.raises(UserError) as error:
        split(network("digits-cnn"), stage)
    assert str(error.value) == (
        "stages: expected at most 3, which leaves one of the network's 4 layers to train, "
        f"found {stage}"
    )


# --- Training in stages


STAGES = {"stages": 2, "stage_epochs": 2, "stage_learning_rate": 1e-3, "stage_milestones": (1.0,)}


def in_stages(**changes: object) -> Config:
    return full_strength("advibp", epochs=2, **(STAGES | changes))


@pytest.mark.parametrize("shi", [{}, SHI], ids=["plain", "batch norm"])
def test_a_run_stopped_anywhere_in_its_stages_ends_in_the_bits_of_an_unbroken_one(shi, tmp_path):
    config, few = in_stages(**shi), few_digits()
    trained(config, tmp_path / "unbroken", (6,), few)
    trained(config, tmp_path / "every", (1, 2, 3, 4, 5, 6), few)  # inside stages and between them
    assert_same_files(tmp_path / "unbroken", tmp_path / "every")
    metrics = RunDirectory(tmp_path / "unbroken").metrics()
    assert [epoch["stage"] for epoch in metrics] == [0, 0, 1, 1, 2, 2]
    rates = [epoch["learning_rate"] for epoch in metrics[2:]]
    assert rates == pytest.approx([1e-3, 2e-4] * 2)


class Interrupts(Silent):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def batch(self, epoch, batch, batches, now, means):
        if (epoch, batch) == (self.at, 2):
            raise KeyboardInterrupt


@pytest.mark.parametrize("epoch", [2, 3])  # counted from 0: the first and the second of stage 1
def test_a_stage_interrupted_between_two_batches_resumes_to_the_same_bits(epoch, tmp_path):
    config, few = in_stages(**SHI), few_digits()
    trained(config, tmp_path / "unbroken", (6,), few)
    broken = RunDirectory(tmp_path / "broken")
    broken.path.mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(Trainer(config, few, ALONE), broken, Interrupts(epoch), 6)
    assert checkpoint.load(broken.checkpoint_file)["epochs_done"] == epoch
    trained(config, broken.path, (6,), few)
    assert_same_files(tmp_path / "unbroken", broken.path)


def test_a_stage_moves_the_layers_after_its_input_and_no_other(tmp_path):
    trainer = Trainer(in_stages(**SHI), few_digits(), ALONE)
    for _ in range(2):
        trainer.train_epoch(Silent())
    assert any(isinstance(layer, BatchNorm) for layer in trainer.network)
    before = trainer.certifiable().state_dict()
    # Conv2d, Conv2d, Linear, Linear; BatchNorm is folded away when the first stage begins.
    layers = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    rest = ["5.weight", "5.bias", "7.weight", "7.bias"]
    for stage, frozen in ((1, layers[0]), (2, layers[0] + layers[1])):
        for _ in range(2):
            trainer.train_epoch(Silent())
        assert trainer.stage.number == stage
        after = {key: value.clone() for key, value in trainer.network.state_dict().items()}
        assert set(after) == {*layers[0], *layers[1], *rest}
        for key, value in after.items():
            assert torch.equal(value, before[key]) == (key in frozen), key
        before = after


def test_a_stage_begins_with_a_fresh_optimizer_for_its_layers(tmp_path):
    trainer = Trainer(in_stages(authors_weights=True), few_digits(), ALONE)
    for _ in range(3):
        trainer.train_epoch(Silent())
    [group] = trainer.optimizer.param_groups
    names = [name for name, _ in trainer.network.named_parameters()]
    trained_names = [
        name
        for name, parameter in trainer.network.named_parameters()
        if any(parameter is one for one in group["params"])
    ]
    assert trained_names == names[2:]
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {3.0}  # of this stage's first epoch alone
    moments = trainer.optimizer.state_dict()["moments"]
    assert (int(moments["count"]), list(moments["exp_avg"])) == (3, [0])
    shape = (2, *trainer.network[2].weight.shape)
    assert tuple(moments["exp_avg"][0].shape) == shape


def test_the_network_is_kept_as_it_was_when_each_stage_ended(tmp_path):
    few, directory = few_digits(), RunDirectory(tmp_path)
    directory.start(in_stages())
    trainer = Trainer(in_stages(), few, ALONE)
    for stage, end in enumerate((2, 4, 6)):
        run(trainer, directory, Silent(), end - 1)
        assert not directory.stage_file(stage).exists()
        trainer = Trainer(in_stages(), few, ALONE)
        run(trainer, directory, Silent(), end)
        network, epoch = load_network(directory, few, f"stage-{stage}")
        assert epoch == end
        assert all(map(torch.equal, network.parameters(), trainer.network.parameters()))
        trainer = Trainer(in_stages(), few, ALONE)
    assert not directory.stage_file(3).exists()


def test_a_run_without_stages_keeps_no_stage(tmp_path):
    trained(full_strength("natural", epochs=1), tmp_path, (1,), few_digits())
    assert list(tmp_path.glob("stage-*")) == []


def test_a_stage_beyond_the_last_layer_is_refused():
    with pytest.raises(UserError, match=r"^stages: expected at most 3, .* found 4$"):
        Trainer(in_stages(stages=4), few_digits(), ALONE)
    Trainer(in_stages(stages=3), few_digits(), ALONE)
