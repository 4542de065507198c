"""Which settings a method reads: what a configuration sets beside them would be set in vain."""

import dataclasses
import math

from robust_app import methods
from robust_app.config import Config, as_set
from robust_app.errors import SettingError, UserError
from robust_app.methods import Method


def check(config: Config) -> None:
    """See that a run's method fits the rest of its configuration.

    Raises:
        UserError: if there is no such method.
        SettingError: a setting is another than the default where the method, or a network without
            BatchNorm, ignores it.
    """
    method = methods.find(config.method)
    neutral = {field.name: field.default for field in dataclasses.fields(Config)}
    neutral["adversarial_epochs"] = 0.0
    for name in _ignored(method):
        value = getattr(config, name)
        if value != neutral[name]:
            expected = f"{as_set(neutral[name])} for {config.method}"
            raise SettingError(name, f"expected {expected}, found {as_set(value)}")
    if not config.batch_norm and config.first_batch_norm_frozen_from != math.inf:
        found = as_set(config.first_batch_norm_frozen_from)
        raise SettingError(
            "first_batch_norm_frozen_from", f"expected inf without batch_norm, found {found}"
        )
    if config.authors_weights and config.preference != (1.0, 1.0):
        found = as_set(config.preference)
        raise SettingError("preference", f"expected [1, 1] for authors_weights, found {found}")
    if config.method == "latent-adversarial" and config.stages == 0:
        raise SettingError("stages", "expected at least 1 for latent-adversarial, found 0")
    if config.method == "diffai" and len(set(config.natural_weight)) > 1:
        found = as_set(config.natural_weight)
        raise SettingError("natural_weight", f"expected twice the same for diffai, found {found}")


def check_changes(config: Config, changed: Config) -> None:
    """See that the run reads what a user changed in a configuration.

    Recipes, and the configurations that runs keep, hold these settings whether they are read or
    not. FOSC's are not among them: a schedule has them for AdvIBP and for what is compared with it.

    Raises:
        UserError: the method is unknown, or does not fit the rest of the recipe.
        SettingError: a setting differs that the changed configuration leaves unread, or that comes
            after its end.
    """
    method = methods.find(changed.method)
    if changed.method != config.method:
        _check_method(config, changed)
    stages = ("stage_epochs", "stage_learning_rate", "stage_milestones")
    unread = {
        "epsilon": (not method.has_radius, f"for {changed.method}"),
        "ramp_epochs": (not method.has_radius, f"for {changed.method}"),
        "crown_share": (not method.crown, f"for {changed.method}"),
        "natural_weight": (method.losses != ("mixed",), f"for {changed.method}"),
        "crop_padding": (not changed.augment, "without augment"),
        "horizontal_flip": (not changed.augment, "without augment"),
        **dict.fromkeys(stages, (changed.stages == 0, "without stages")),
    }
    for name, (so, where) in unread.items():
        was, now = getattr(config, name), getattr(changed, name)
        if so and now != was:
            raise SettingError(name, f"expected {as_set(was)} {where}, found {as_set(now)}")
    earlier = _times(config)
    for name, (epochs, end) in _times(changed).items():
        late = [epoch for epoch in epochs if end <= epoch < math.inf]
        if late and earlier[name] != (epochs, end):
            raise SettingError(
                name,
                f"expected less than the {end} epochs, found {as_set(late[0])} "
                "(train --epochs shortens the whole schedule)",
            )


def _check_method(config: Config, changed: Config) -> None:
    """See that a method chosen in place of a recipe's fits what the user left of the recipe."""
    try:
        check(changed)
    except SettingError as error:
        if getattr(changed, error.setting) != getattr(config, error.setting):
            raise
        raise UserError(
            f"{error} (the recipe is one for {config.method}; take one for {changed.method}, "
            f"such as digits-{changed.method})"
        ) from None


def _times(config: Config) -> dict[str, tuple[tuple[float, ...], int]]:
    """The epochs at which something is to happen, and the number of them, by setting."""
    return {
        "milestones": (config.milestones, config.epochs),
        "first_batch_norm_frozen_from": ((config.first_batch_norm_frozen_from,), config.epochs),
        "stage_milestones": (config.stage_milestones, config.stage_epochs),
    }


def _ignored(method: Method) -> list[str]:
    """The settings of some methods that this one ignores, and a user would not set in vain."""
    adversarial = "adversarial" in method.losses
    ignored = {
        "adversarial_epochs": not adversarial,
        "box_regularizers": method.losses in (("natural",), ("adversarial",)),
        "certified_epochs": method.losses != methods.JOINT,
        "authors_weights": method.rule is not methods.paper_rule,
        "regularization": method.rule is not methods.paper_rule,
        "preference": method.rule is None,
        "moment_decay": method.rule is None,
        "attack_step": not adversarial or method.attack is not methods.fgsm_random,
        "attack_steps": method.attack is not methods.pgd,
        "one_start_per_batch": not adversarial or method.attack is methods.fgsm,
    }
    return [name for name, so in ignored.items() if so]
