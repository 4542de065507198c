"""A configuration changed: single values, the length of its schedule, and what then differs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from robust_app import documents
from robust_app.config import Config, as_set
from robust_app.errors import UserError


def override(config: Config, assignments: Sequence[str]) -> Config:
    """The config with some fields set from ``key=value`` texts; of two for one key, the last wins.

    A value is read as TOML, or as a fraction such as 8/255; what is neither, such as a bare word,
    is a string.

    Raises:
        UserError: an assignment has no ``=``, its key is unknown or its value is refused.

    >>> from robust_app import recipes
    >>> override(recipes.load("digits"), ["epsilon=0.05", "model=dm-small"]).model
    'dm-small'
    """
    values = dataclasses.asdict(config)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set: expected key=value, found {assignment!r}")
        values[key.strip()] = _toml_value(text.strip())
    return Config.from_mapping(values)


def fraction(text: str) -> float:
    """A number written as two, as radii of pixels often are.

    Raises:
        ValueError, ArithmeticError: if it is none.

    >>> fraction("8/255") == 8 / 255
    True
    """
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator)


def _toml_value(text: str) -> object:
    try:
        document = documents.parse_toml(f"value = {text}")
    except ValueError:
        try:
            return fraction(text)
        except (ValueError, ArithmeticError):
            return text
    # A line break in the text would add keys: then it is no value.
    return document["value"] if len(document) == 1 else text


def differences(old: Config, new: Config) -> str:
    """Every field in which two configurations differ, with both values; empty if none.

    >>> from robust_app import recipes
    >>> digits = recipes.load("digits")
    >>> differences(digits, override(digits, ["seed=1", "epsilon=0.2"]))
    'epsilon: 0.1, not 0.2; seed: 0, not 1'
    """
    pairs = [
        (field.name, getattr(old, field.name), getattr(new, field.name))
        for field in dataclasses.fields(Config)
    ]
    return "; ".join(
        f"{name}: {as_set(was)}, not {as_set(now)}" for name, was, now in pairs if was != now
    )


def with_epochs(config: Config, epochs: int) -> Config:
    """The config with its whole schedule stretched or shrunk to a run of ``epochs`` epochs.

    Every duration and milestone keeps its share of the run; layer-wise stages, which come after
    these epochs, are stretched alike, to a whole number of epochs each, and their milestones keep
    their shares of that.

    >>> from robust_app import recipes
    >>> short = with_epochs(recipes.load("mnist-dm-small"), 25)
    >>> short.epochs, short.adversarial_epochs, short.milestones
    (25, 4.0, (15.0, 20.0))
    """

    if epochs == config.epochs:
        return config

    def scaled(duration: float) -> float:
        return duration * epochs / config.epochs

    phases = ("natural_epochs", "adversarial_epochs", "certified_epochs")
    durations = (*phases, "ramp_epochs", "fosc_decay_epochs")
    changes: dict[str, Any] = {name: scaled(getattr(config, name)) for name in durations}
    changes["milestones"] = tuple(map(scaled, config.milestones))
    # No sooner than there are statistics.
    changes["first_batch_norm_frozen_from"] = max(1.0, scaled(config.first_batch_norm_frozen_from))
    stage = changes["stage_epochs"] = max(1, round(scaled(config.stage_epochs)))
    changes["stage_milestones"] = tuple(
        milestone * stage / config.stage_epochs for milestone in config.stage_milestones
    )
    return dataclasses.replace(config, epochs=epochs, **changes)
