"""A run's networks, from its directory to errors on test images."""

import dataclasses

import pytest
import torch

from robust_app import checkpoint, data, recipes
from robust_app.errors import UserError
from robust_app.networks import build_network
from robust_app.run_directory import RunDirectory
from robust_app.session import FORMAT, Examination, ends_stage, load_network, measure

DIGITS = recipes.load("digits")


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture
def network(digits) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(DIGITS, digits).eval()


def test_an_examination_is_by_default_the_one_of_the_run():
    config = dataclasses.replace(DIGITS, evaluation_epsilon=0.05, pgd_steps=7, pgd_restarts=2)
    assert Examination.of(config) == Examination(
        epsilon=0.05, pgd_steps=7, pgd_restarts=2, verifiers=("ibp",), time_limit=60.0, images=None
    )


def test_stages_end_with_their_last_epoch():
    config = dataclasses.replace(DIGITS, epochs=40, stages=2, stage_epochs=3)
    ends = [epochs for epochs in range(47) if ends_stage(config, epochs)]
    assert ends == [40, 43, 46]
    assert config.total_epochs == 46


def test_all_test_images_are_measured_unless_fewer_are_asked_for(digits, network):
    how = Examination(0.02, pgd_steps=1, pgd_restarts=1)
    told = []
    errors = measure(network, digits, how, 0, told.append)
    assert errors.examples == sum(told) == 360
    few = dataclasses.replace(how, images=50)
    told.clear()
    assert measure(network, digits, few, 0, told.append).examples == sum(told) == 50


def test_the_images_drawn_depend_on_the_seed_alone(digits, network):
    how = Examination(0.02, pgd_steps=1, pgd_restarts=1, images=37)
    seen = []
    network[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def drawn(seed: int) -> torch.Tensor:
        seen.clear()
        measure(network, digits, how, seed, lambda _: None)
        return seen[0]

    first = drawn(3)
    assert torch.equal(first, drawn(3))
    assert not torch.equal(first, drawn(4))
    assert len(first.flatten(1).unique(dim=0)) == 37  # none of them twice


def test_more_images_than_there_are_is_refused(digits, network):
    how = Examination(0.02, pgd_steps=1, pgd_restarts=1, images=361)
    with pytest.raises(
        UserError, match=r"^images: expected at most the 360 test images, found 361"
    ):
        measure(network, digits, how, 0, lambda _: None)


def test_a_saved_network_is_loaded_with_its_epoch(tmp_path, digits, network):
    directory = RunDirectory(tmp_path)
    directory.start(DIGITS)
    content = FORMAT | {"epoch": 5, "network": network.state_dict()}
    checkpoint.save(content, directory.stage_file(2))
    loaded, epoch = load_network(directory, digits, "stage-2")
    assert epoch == 5
    assert not loaded.training
    x = digits.x_test[:3].float() / 255
    assert torch.equal(loaded(x), network(x))
    with pytest.raises(UserError, match=r"stage-1\.pt: cannot be read"):
        load_network(directory, digits, "stage-1")


def test_a_file_without_a_network_is_refused(tmp_path, digits):
    directory = RunDirectory(tmp_path)
    directory.start(DIGITS)
    checkpoint.save(FORMAT | {"epoch": 5}, directory.last_file)
    with pytest.raises(UserError, match=r"last\.pt: holds no network$"):
        load_network(directory, digits, "last")
