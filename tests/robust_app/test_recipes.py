"""The recipes of the package against appendix A.5 of the paper and the tables they refer to."""

import dataclasses
import math

import pytest

from robust_app.config import load_recipe, recipe_description, recipe_names
from robust_app.data import DATASETS, load
from robust_app.models import MODELS
from robust_app.schedules import Phase, fosc_threshold, phase, smoothed_ramp, step_decay

SIZES = ("small", "medium", "large")


def test_the_recipes_are_those_of_the_paper_and_digits():
    expected = [f"{data}-dm-{size}" for data in ("mnist", "cifar10") for size in SIZES]
    assert recipe_names() == sorted([*expected, "digits"])


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_described_in_a_line_and_names_what_exists(name):
    config = load_recipe(name)
    assert config.dataset in DATASETS
    assert config.model in MODELS
    assert 0 < len(recipe_description(name)) < 100
    assert recipe_description(name).isprintable()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_ends_at_full_strength(name):
    config = load_recipe(name)
    joint = config.epochs - config.natural_epochs - config.adversarial_epochs
    assert phase(config.epochs, config.natural_epochs, config.adversarial_epochs) is Phase.JOINT
    assert smoothed_ramp(joint, config.ramp_epochs) == 1
    assert fosc_threshold(joint, 1.0, config.ramp_epochs, config.fosc_decay_epochs) == 0
    assert all(milestone < config.epochs for milestone in config.milestones)
    assert config.evaluation_epsilon <= config.epsilon


@pytest.mark.parametrize("size", SIZES)
def test_mnist_has_the_numbers_of_the_paper(size):
    config = load_recipe(f"mnist-dm-{size}")
    assert (config.dataset, config.model, config.method) == ("mnist", f"dm-{size}", "advibp")
    assert (config.epsilon, config.evaluation_epsilon) == (0.4, 0.3)
    assert (config.natural_epochs, config.adversarial_epochs) == (10, 40)
    assert config.epochs == 10 + 40 + 200
    assert (config.ramp_epochs, config.fosc_decay_epochs, config.fosc_maximum) == (50, 50, 1e-4)
    rates = [
        step_decay(t, config.learning_rate, config.milestones, config.learning_rate_factor)
        for t in (149, 150, 200)
    ]
    assert rates == pytest.approx([5e-4, 1.25e-4, 3.125e-5])
    assert (config.batch_size, config.moment_decay) == (256, (0.9, 0.99))
    assert (config.gradient_clip, config.augment, config.held_out) == (math.inf, False, 5000)
    assert config.pgd_steps == 200


@pytest.mark.parametrize("size", SIZES)
def test_cifar10_has_the_numbers_of_the_paper(size):
    config = load_recipe(f"cifar10-dm-{size}")
    assert (config.dataset, config.model, config.method) == ("cifar10", f"dm-{size}", "advibp")
    assert config.epsilon == pytest.approx(1.1 * 8 / 255, rel=1e-15)
    assert config.evaluation_epsilon == 8 / 255
    assert (config.natural_epochs, config.adversarial_epochs, config.epochs) == (400, 410, 3200)
    assert (config.ramp_epochs, config.fosc_decay_epochs) == (1000, 280)
    assert config.fosc_maximum == 1e-3
    rates = [
        step_decay(t, config.learning_rate, config.milestones, config.learning_rate_factor)
        for t in (2199, 2200, 2700)
    ]
    assert rates == pytest.approx([5e-4, 5e-5, 5e-6])
    assert (config.batch_size, config.moment_decay) == (256, (0.9, 0.99))
    assert (config.gradient_clip, config.augment, config.held_out) == (math.inf, True, 5000)
    assert config.pgd_steps == 200


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_the_sizes_differ_in_the_model_alone(data):
    small, medium, large = (load_recipe(f"{data}-dm-{size}") for size in SIZES)
    assert dataclasses.replace(medium, model="dm-small") == small
    assert dataclasses.replace(large, model="dm-small") == small


def test_digits_leaves_whole_batches_to_train_on():
    config = load_recipe("digits")
    assert len(load("digits").x_train) - config.held_out >= config.batch_size
