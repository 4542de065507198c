"""The table of methods, and what each trains."""

import dataclasses

import pytest
import torch

from mogd import BisectorProjection, Constant
from robust_app import methods, recipes
from robust_app.authors import AuthorsWeights
from robust_app.errors import UserError
from robust_app.methods import METHODS, Attack, find, losses_of
from robust_app.run_directory import RunDirectory
from robust_app.schedules import Phase
from tests.robust_app.runs import (
    NEEDED,
    assert_same_files,
    few_digits,
    full_strength,
    parameters_of,
    trained,
)

DIGITS = recipes.load("digits")


@pytest.mark.parametrize(
    ("name", "losses", "crown"),
    [
        ("natural", ("natural",), False),
        ("fgsm", ("adversarial",), False),
        ("fgsm-random", ("adversarial",), False),
        ("pgd", ("adversarial",), False),
        ("ibp", ("mixed",), False),
        ("crown-ibp", ("mixed",), True),
        ("diffai", ("mixed",), False),
        ("latent-adversarial", ("adversarial",), False),
        ("weighted-sum", ("adversarial", "certified"), False),
        ("advibp", ("adversarial", "certified"), False),
        ("advcrown-ibp", ("adversarial", "certified"), True),
    ],
)
def test_what_a_method_trains_on(name, losses, crown):
    method = find(name)
    assert (method.losses, method.crown) == (losses, crown)
    assert (method.rule is None) == (len(losses) == 1)  # one loss needs no weights
    assert losses_of(method, Phase.MAIN) == losses
    for phase in (Phase.NATURAL, Phase.ADVERSARIAL, Phase.CERTIFIED):
        assert losses_of(method, phase) == (phase.value,)


def test_the_table_has_nothing_else():
    assert len(METHODS) == 11
    assert all(method.description.isprintable() for method in METHODS.values())


def test_the_attacks():
    config = dataclasses.replace(DIGITS, attack_step=1.5, attack_steps=5)
    assert METHODS["fgsm"].attack(config) == Attack(1, 1.0, random_start=False)
    assert METHODS["pgd"].attack(config) == Attack(5, 0.5, random_start=True)
    for name in METHODS.keys() - {"fgsm", "pgd"}:
        assert METHODS[name].attack(config) == Attack(1, 1.5, random_start=True)


def test_the_rules():
    config = dataclasses.replace(DIGITS, regularization=0.25)
    leaning = dataclasses.replace(config, preference=(1.0, 3.0))
    theirs = dataclasses.replace(config, authors_weights=True)
    assert METHODS["weighted-sum"].rule(config) == Constant((1.0, 1.0))
    assert METHODS["weighted-sum"].rule(leaning) == Constant((1.0, 3.0))
    for name in ("advibp", "advcrown-ibp"):
        assert METHODS[name].rule(config) == BisectorProjection(0.25, (1.0, 1.0))
        assert METHODS[name].rule(leaning) == BisectorProjection(0.25, (1.0, 3.0))
        assert METHODS[name].rule(theirs) == AuthorsWeights(0.25)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match=r"^unknown method 'advipb'; the nearest known is 'advibp'"):
        find("advipb")


def test_the_losses_are_those_that_a_step_makes():
    known = {"natural", "adversarial", "certified", "mixed"}
    assert {loss for method in METHODS.values() for loss in method.losses} <= known
    assert methods.JOINT == ("adversarial", "certified")


# --- Trained by each


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_loss_and_resumes_to_the_same_bits(method, tmp_path):
    config = full_strength(method, **NEEDED.get(method, {}))
    whole, few = config.total_epochs, few_digits()
    unbroken = trained(config, tmp_path / "unbroken", (whole,), few)
    trained(config, tmp_path / "resumed", (4, whole), few)
    assert_same_files(tmp_path / "unbroken", tmp_path / "resumed")

    metrics = RunDirectory(tmp_path / "unbroken").metrics()
    losses = [f"{name}_loss" for name in METHODS[method].losses]
    for loss in losses:
        assert metrics[5][loss] < metrics[0][loss]
    reported = {key for key in metrics[0] if key.endswith("_loss")}
    assert reported == set(losses)
    assert ("certified_weight" in metrics[0]) == (len(losses) == 2)
    assert unbroken.epochs_done == whole


def test_every_method_trains_another_network(tmp_path):
    few = few_digits()
    networks = {
        method: parameters_of(
            trained(full_strength(method, **NEEDED.get(method, {})), tmp_path / method, (2,), few)
        )
        for method in METHODS
    }
    # Before its stages, latent-adversarial is fgsm-random.
    assert torch.equal(networks.pop("latent-adversarial"), networks["fgsm-random"])
    found = list(networks.values())
    for index, parameters in enumerate(found):
        for other in found[index + 1 :]:
            assert not torch.equal(parameters, other)


def test_a_run_that_ends_with_crown_bounds_is_measured_with_them():
    ibp = recipes.load("cifar10-dm-small-8-255-crown-ibp")
    assert methods.verifiers_of(ibp) == ("ibp",)
    both = recipes.load("cifar10-dm-small-2-255-crown-ibp")
    assert both.crown_share == (1, 1)
    assert methods.verifiers_of(both) == ("ibp", "crown-ibp")
    assert methods.verifiers_of(recipes.load("cifar10-dm-small-2-255-advibp")) == ("ibp",)
