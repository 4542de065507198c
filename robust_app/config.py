"""Everything a training run depends on, as one frozen dataclass, and its recipes in TOML.

A recipe is a TOML file with one key per field of :class:`Config` and a ``description``; those of
the package lie in ``recipes/``. Times are in epochs and may be fractional, ε is in pixels of
[0, 1].
"""

import dataclasses
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

from robust_app.errors import UserError, unknown


class Rule(NamedTuple):
    """What a field may hold: said in words, tested, and converted to the field's type."""

    expectation: str
    admits: Callable[[Any], bool]
    convert: Callable[[Any], object]


def _within(value: object, low: float, high: float) -> bool:
    """Whether value is a number in [low, high]; neither a bool nor NaN is one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and _within(value, low, high)


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


# The ends of the open ranges: the float next to 0, next to 1, and what float32 can hold.
_TINY, _BELOW_ONE, _HUGE = math.nextafter(0, 1), math.nextafter(1, 0), 3.4e38
_LIST = (list, tuple)

TEXT = Rule(
    "a non-empty printable string",
    lambda v: isinstance(v, str) and v != "" and v.isprintable(),
    str,
)
SWITCH = Rule("true or false", lambda v: isinstance(v, bool), bool)
POSITIVE_INTEGER = Rule("an integer of at least 1", lambda v: _whole(v, 1, sys.maxsize), int)
INTEGER = Rule("an integer of at least 0", lambda v: _whole(v, 0, sys.maxsize), int)
UNIT = Rule("a number in [0, 1]", lambda v: _within(v, 0, 1), float)
FACTOR = Rule("a number in (0, 1]", lambda v: _within(v, _TINY, 1), float)
POSITIVE = Rule("a finite number above 0", lambda v: _within(v, _TINY, _HUGE), float)
LIMIT = Rule("a number above 0, or inf", lambda v: _within(v, _TINY, math.inf), float)
NONNEGATIVE = Rule("a finite number of at least 0", lambda v: _within(v, 0, _HUGE), float)
NONNEGATIVES = Rule(
    "a list of finite numbers of at least 0",
    lambda v: isinstance(v, _LIST) and all(_within(x, 0, _HUGE) for x in v),
    _floats,
)
DECAYS = Rule(
    "two numbers in [0, 1)",
    lambda v: isinstance(v, _LIST) and len(v) == 2 and all(_within(x, 0, _BELOW_ONE) for x in v),
    _floats,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run, complete: the same Config and seed give the same run.

    Args:
        dataset, model, method: names from the tables of :mod:`robust_app.data`,
            :mod:`robust_app.models` and :mod:`robust_app.methods`.
        epsilon: ε_train, the radius trained at, in pixels of [0, 1].
        evaluation_epsilon: the radius of the final evaluation, in pixels of [0, 1].
        epochs: length of the whole run, warm-up included.
        batch_size, learning_rate: of every phase, with Adam.
        milestones: epochs, counted from the start of the run, at which the learning rate is
            multiplied by ``learning_rate_factor``, in (0, 1].
        natural_epochs, adversarial_epochs: T_nat and T_adv, the warm-up.
        ramp_epochs: R, in which ε grows from 0 to ε_train, counted from the end of the warm-up.
        fosc_maximum: c_max. The threshold c_t stays there until the ramp ends.
        fosc_decay_epochs: T', in which c_t then falls to 0.
        moment_decay: (β₁, β₂), each in [0, 1).
        regularization: κ_reg, at least 0.
        attack_step: the step of FGSM in units of ε.
        gradient_clip: largest norm of a step's gradient; inf leaves it as it is.
        augment: random flips and crops of the training images.
        held_out: number of training images set aside to choose the best epoch by.
        pgd_steps, pgd_restarts: strength of the attack in the final evaluation.
        seed: of initialisation, order of the examples, augmentation and attacks.

    Raises:
        UserError: a value is of the wrong type or out of its range.
    """

    dataset: Annotated[str, TEXT]
    model: Annotated[str, TEXT]
    method: Annotated[str, TEXT]
    epsilon: Annotated[float, UNIT]  # ε_train
    evaluation_epsilon: Annotated[float, UNIT]
    epochs: Annotated[int, POSITIVE_INTEGER]
    batch_size: Annotated[int, POSITIVE_INTEGER]
    learning_rate: Annotated[float, POSITIVE]  # η
    milestones: Annotated[tuple[float, ...], NONNEGATIVES]
    learning_rate_factor: Annotated[float, FACTOR]
    natural_epochs: Annotated[float, NONNEGATIVE]  # T_nat
    adversarial_epochs: Annotated[float, NONNEGATIVE]  # T_adv
    ramp_epochs: Annotated[float, NONNEGATIVE]  # R
    fosc_maximum: Annotated[float, NONNEGATIVE]  # c_max
    fosc_decay_epochs: Annotated[float, NONNEGATIVE]  # T'
    moment_decay: Annotated[tuple[float, float], DECAYS] = (0.9, 0.99)  # β₁, β₂
    regularization: Annotated[float, NONNEGATIVE] = 0.5  # κ_reg
    attack_step: Annotated[float, POSITIVE] = 1.25  # α / ε
    gradient_clip: Annotated[float, LIMIT]
    augment: Annotated[bool, SWITCH]
    held_out: Annotated[int, INTEGER]
    pgd_steps: Annotated[int, POSITIVE_INTEGER]
    pgd_restarts: Annotated[int, POSITIVE_INTEGER]
    seed: Annotated[int, INTEGER]

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if not rule.admits(value):
                raise UserError(f"{name}: expected {rule.expectation}, found {value!r}")
            object.__setattr__(self, name, rule.convert(value))
        warm_up = self.natural_epochs + self.adversarial_epochs
        if warm_up > self.epochs * (1 + 1e-9):
            raise UserError(
                f"epochs: expected at least the {warm_up:g} of the warm-up, found {self.epochs} "
                "(train --epochs shortens the whole schedule)"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Config":
        """A Config from field names and values, as TOML or JSON give them.

        Raises:
            UserError: a key is unknown or missing, or a value is refused.
        """
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for key in mapping:
            if key not in names:
                raise unknown("key", key, names)
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in mapping]
        if missing:
            raise UserError(f"missing keys: {', '.join(missing)}")
        return cls(**mapping)

    def to_toml(self) -> str:
        """All fields as TOML, one a line; reading it back gives an equal Config."""
        values = dataclasses.asdict(self).items()
        return "".join(f"{name} = {_to_toml(value)}\n" for name, value in values)


_RULES: dict[str, Rule] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Config, include_extras=True).items()
}


def _to_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_to_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # printable strings are alike in both
    return repr(value)


def override(config: Config, assignments: Sequence[str]) -> Config:
    """The config with some fields set from ``key=value`` texts; of two for one key, the last wins.

    A value is read as TOML; what is not TOML, such as a bare word, is a string.

    Raises:
        UserError: an assignment has no ``=``, its key is unknown or its value is refused.

    >>> override(load_recipe("digits"), ["epsilon=0.05", "model=dm-small"]).model
    'dm-small'
    """
    values = dataclasses.asdict(config)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"expected key=value, found {assignment!r}")
        values[key.strip()] = _toml_value(text.strip())
    return Config.from_mapping(values)


def _toml_value(text: str) -> object:
    try:
        document = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    # A line break in the text would add keys: then it is no value.
    return document["value"] if len(document) == 1 else text


def with_epochs(config: Config, epochs: int) -> Config:
    """The config with its whole schedule stretched or shrunk to a run of ``epochs`` epochs.

    Every duration and milestone keeps its share of the run.

    >>> short = with_epochs(load_recipe("mnist-dm-small"), 25)
    >>> short.epochs, short.adversarial_epochs, short.milestones
    (25, 4.0, (15.0, 20.0))
    """

    if epochs == config.epochs:
        return config

    def scaled(duration: float) -> float:
        return duration * epochs / config.epochs

    changes: dict[str, Any] = {
        name: scaled(value)
        for name, value in dataclasses.asdict(config).items()
        if name.endswith("_epochs")
    }
    changes["milestones"] = tuple(map(scaled, config.milestones))
    return dataclasses.replace(config, epochs=epochs, **changes)


def recipe_names() -> list[str]:
    """The names of the recipes in the package, sorted."""
    files = [file.name for file in _recipes().iterdir()]
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def load_recipe(name_or_path: str | Path) -> Config:
    """The Config of a recipe of the package, or of a file where the argument ends in ``.toml``.

    Raises:
        UserError: there is no such recipe or file, it is not TOML, or a value is refused.
    """
    values = _read_recipe(name_or_path)
    values.pop("description", None)
    try:
        return Config.from_mapping(values)
    except UserError as error:
        raise UserError(f"recipe {name_or_path}: {error}") from None


def recipe_description(name_or_path: str | Path) -> str:
    """What the recipe says of itself in a line; empty where it says nothing.

    Raises:
        UserError: there is no such recipe or file, or it is not TOML.
    """
    return str(_read_recipe(name_or_path).get("description", ""))


def _recipes() -> Traversable:
    return resources.files("robust_app") / "recipes"


def _read_recipe(name_or_path: str | Path) -> dict[str, Any]:
    name = str(name_or_path)
    if not name.endswith(".toml"):
        if name not in recipe_names():
            raise unknown("recipe", name, recipe_names())
        return tomllib.loads((_recipes() / f"{name}.toml").read_text(encoding="utf-8"))
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {name}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"recipe {name}: not valid TOML ({error})") from error
