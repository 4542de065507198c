"""What does not fit a method is refused, and what fits is taken."""

import dataclasses
import pickle

import pytest

from robust_app import recipes
from robust_app.errors import SettingError, UserError
from robust_app.method_settings import check, check_changes
from robust_app.methods import METHODS
from tests.robust_app.runs import NEEDED, full_strength

DIGITS = recipes.load("digits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "latent-adversarial"},
            "stages: expected at least 1 for latent-adversarial, found 0",
        ),
        (
            {"method": "diffai", "adversarial_epochs": 0.0},
            "natural_weight: expected twice the same for diffai, found [1, 0.5]",
        ),
        (
            {"method": "weighted-sum", "authors_weights": True},
            "authors_weights: expected false for weighted-sum, found true",
        ),
        (
            {"authors_weights": True, "preference": (1, 2)},
            "preference: expected [1, 1] for authors_weights, found [1, 2]",
        ),
        (
            {"first_batch_norm_frozen_from": 2.0},
            "first_batch_norm_frozen_from: expected inf without batch_norm, found 2",
        ),
        (
            {"method": "ibp", "adversarial_epochs": 0.0, "preference": (1, 2)},
            "preference: expected [1, 1] for ibp, found [1, 2]",
        ),
        (
            {"method": "ibp", "adversarial_epochs": 0.0, "certified_epochs": 2},
            "certified_epochs: expected 0 for ibp, found 2",
        ),
        (
            {"method": "natural"},
            "adversarial_epochs: expected 0 for natural, found 3",
        ),
        (
            {"method": "fgsm", "box_regularizers": 0.5},
            "box_regularizers: expected 0 for fgsm, found 0.5",
        ),
        ({"attack_steps": 50}, "attack_steps: expected 10 for advibp, found 50"),
        (
            {"method": "pgd", "attack_step": 2.0},
            "attack_step: expected 1.25 for pgd, found 2",
        ),
        (
            {"method": "fgsm", "one_start_per_batch": True},
            "one_start_per_batch: expected false for fgsm, found true",
        ),
        (
            {"method": "weighted-sum", "regularization": 7},
            "regularization: expected 0.5 for weighted-sum, found 7",
        ),
        (
            {"method": "pgd", "moment_decay": (0, 0)},
            "moment_decay: expected [0.9, 0.99] for pgd, found [0, 0]",
        ),
    ],
)
def test_a_configuration_that_a_method_would_ignore_is_refused(changes, message):
    with pytest.raises(UserError) as error:
        check(dataclasses.replace(DIGITS, **changes))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("method", "read", "changes", "message"),
    [
        (
            "advibp",
            {"method": "advcrown-ibp"},
            {"crown_share": (1.0, 0.5)},
            "crown_share: expected [1, 0] for advibp, found [1, 0.5]",
        ),
        (
            "weighted-sum",
            {"method": "crown-ibp", "adversarial_epochs": 0.0},
            {"natural_weight": (1.0, 0.0)},
            "natural_weight: expected [1, 0.5] for weighted-sum, found [1, 0]",
        ),
        (
            "natural",
            {"method": "fgsm"},
            {"epsilon": 0.3},
            "epsilon: expected 0.1 for natural, found 0.3",
        ),
        (
            "natural",
            {"method": "fgsm"},
            {"ramp_epochs": 1.0},
            "ramp_epochs: expected 15 for natural, found 1",
        ),
        (
            "advibp",
            {"augment": True},
            {"crop_padding": 2},
            "crop_padding: expected 4 without augment, found 2",
        ),
        (
            "advibp",
            {"augment": True},
            {"horizontal_flip": True},
            "horizontal_flip: expected false without augment, found true",
        ),
        (
            "advibp",
            {"stages": 1},
            {"stage_epochs": 30},
            "stage_epochs: expected 10 without stages, found 30",
        ),
        (
            "advibp",
            {"stages": 1},
            {"stage_milestones": (2.0,)},
            "stage_milestones: expected [5] without stages, found [2]",
        ),
    ],
)
def test_a_change_of_what_a_run_does_not_read_is_refused(method, read, changes, message):
    config = dataclasses.replace(DIGITS, method=method)
    with pytest.raises(UserError) as error:
        check_changes(config, dataclasses.replace(config, **changes))
    assert str(error.value) == message
    check_changes(config, dataclasses.replace(config, **read, **changes))
    check_changes(dataclasses.replace(config, **changes), dataclasses.replace(config, **changes))


def test_a_refusal_of_a_setting_is_the_same_in_another_process():
    error = pickle.loads(pickle.dumps(SettingError("epochs", "expected 2, found 1")))
    assert (str(error), error.setting) == ("epochs: expected 2, found 1", "epochs")


@pytest.mark.parametrize(
    ("method", "own", "refused"),
    [
        ("ibp", {}, "adversarial_epochs: expected 0 for ibp, found 3"),
        ("latent-adversarial", {}, "stages: expected at least 1 for latent-adversarial, found 0"),
        (
            "diffai",
            {"adversarial_epochs": 0.0},
            "natural_weight: expected twice the same for diffai, found [1, 0.5]",
        ),
    ],
)
def test_who_changes_the_method_is_pointed_to_its_recipes(method, own, refused):
    with pytest.raises(UserError) as error:
        check_changes(DIGITS, dataclasses.replace(DIGITS, method=method, **own))
    said = (
        f"{refused} (the recipe is one for advibp; take one for {method}, such as digits-{method})"
    )
    assert str(error.value) == said
    assert recipes.load(f"digits-{method}").method == method


def test_who_changes_the_method_and_what_it_ignores_is_not_pointed_to_recipes():
    own = {"adversarial_epochs": 0.0, "preference": (1.0, 2.0)}
    with pytest.raises(UserError) as error:
        check_changes(DIGITS, dataclasses.replace(DIGITS, method="ibp", **own))
    assert str(error.value) == "preference: expected [1, 1] for ibp, found [1, 2]"


def test_a_method_that_fits_what_is_left_of_the_recipe_is_taken():
    check_changes(DIGITS, dataclasses.replace(DIGITS, method="ibp", adversarial_epochs=0.0))


def test_a_change_to_no_method_is_refused_without_pointing_to_its_recipes():
    with pytest.raises(UserError, match=r"^unknown method 'idp'; the nearest known is 'ibp'$"):
        check_changes(DIGITS, dataclasses.replace(DIGITS, method="idp"))


SHORT = dataclasses.replace(
    DIGITS,
    epochs=10,
    milestones=(9.9,),
    natural_epochs=0.0,
    adversarial_epochs=0.0,
    ramp_epochs=1.0,
)


@pytest.mark.parametrize(
    ("changes", "name", "epoch"),
    [
        ({"milestones": (2.0, 10.0)}, "milestones", "10"),
        ({"milestones": (12.5,)}, "milestones", "12.5"),
        ({"first_batch_norm_frozen_from": 10.0}, "first_batch_norm_frozen_from", "10"),
        ({"stage_milestones": (11.0,)}, "stage_milestones", "11"),
    ],
)
def test_what_would_come_after_the_end_is_refused(changes, name, epoch):
    config = dataclasses.replace(SHORT, stages=1, stage_epochs=10, batch_norm=True)
    changed = dataclasses.replace(config, **changes)
    message = f"{name}: expected less than the 10 epochs, found {epoch} (train --epochs shortens"
    with pytest.raises(UserError) as error:
        check_changes(config, changed)
    assert str(error.value).startswith(message)
    check_changes(config, dataclasses.replace(changed, epochs=20, stage_epochs=20))
    check_changes(changed, dataclasses.replace(changed, seed=1))  # a recipe may have it


def test_a_run_that_is_cut_short_is_to_keep_its_milestones():
    with pytest.raises(UserError, match=r"milestones: expected less than the 9 epochs, found 9.9"):
        check_changes(SHORT, dataclasses.replace(SHORT, epochs=9))


def test_the_weighted_sum_has_moments_to_tell_of():
    config = dataclasses.replace(DIGITS, method="weighted-sum")
    changed = dataclasses.replace(config, moment_decay=(0.5, 0.9))  # cosines and conflicts differ
    check(changed)
    check_changes(config, changed)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_configuration_that_fits(name):
    check(full_strength(name, **NEEDED.get(name, {})))
