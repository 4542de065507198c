"""Everything a training run depends on, as one frozen dataclass.

Times are in epochs and may be fractional, ε is in pixels of [0, 1].
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from robust_app.errors import SettingError, UserError, shown, unknown
from robust_app.value_rules import (
    ATTEMPTS,
    DECAYS,
    FACTOR,
    INTEGER,
    LATER,
    LIMIT,
    NONNEGATIVE,
    NONNEGATIVES,
    POSITIVE,
    POSITIVE_INTEGER,
    POSITIVE_PAIR,
    PRECISION,
    RATE,
    SWITCH,
    TEXT,
    UNIT,
    UNIT_PAIR,
    Rule,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run, complete: the same Config and seed give the same run.

    Args:
        dataset, model, method: names from the tables of :mod:`robust_app.data`,
            :mod:`robust_app.models` and :mod:`robust_app.methods`.
        batch_norm: train with BatchNorm, folded into the layers before it in what is saved.
        ibp_initialization: begin from weights that keep the size of boxes (Shi et al.), not
            from torch's.
        epsilon: ε_train, the radius trained at, in pixels of [0, 1].
        evaluation_epsilon: the radius of the final evaluation, in pixels of [0, 1].
        epochs: length of the run, warm-up included, layer-wise stages not.
        batch_size, learning_rate: of every phase, with Adam.
        reference_fan_in: multiply the learning rate of weights with n inputs to a unit by
            ``reference_fan_in`` / n, but in layer-wise stages; 0 for no such factor. See
            :func:`robust_app.learning_rates.parameter_groups`.
        milestones: epochs, counted from the start of the run, at which the learning rate is
            multiplied by ``learning_rate_factor``, in (0, 1].
        natural_epochs, adversarial_epochs: T_nat and T_adv, the warm-up.
        ramp_epochs: R, in which ε grows from 0 to ε_train, counted from the end of the warm-up.
        certified_epochs: train on the certified loss alone for so long after the warm-up; the
            authors' code does until ε_train is reached, the paper not at all.
        first_batch_norm_frozen_from: epochs from the start of the run, at least 1, from when on
            the first BatchNorm layer normalises by the statistics that the training images had at
            the end of the epoch before; inf for never, and without ``batch_norm``.
        fosc_maximum: c_max. The threshold c_t stays there until the ramp ends.
        fosc_decay_epochs: T', in which c_t then falls to 0.
        moment_decay: (β₁, β₂), each in [0, 1).
        regularization: κ_reg, at least 0.
        preference: of the adversarial and of the certified loss: what the step leans to where
            they agree (see :class:`mogd.BisectorProjection`), or their weights in
            ``weighted-sum``.
        authors_weights: weigh the losses as the authors' code does; see
            :mod:`robust_app.authors`.
        natural_weight: of the natural loss in ``ibp`` and ``crown-ibp``, at the start and at the
            end of the ramp (κ there; the certified loss has 1 - κ); twice the same for ``diffai``.
        crown_share: of CROWN-IBP bounds in ``crown-ibp`` and ``advcrown-ibp``, at the start and at
            the end of the ramp (β there; interval bounds have 1 - β).
        box_regularizers: weight of the two regularisers of Shi et al. at ε = 0; falls to 0 as ε
            reaches ε_train.
        attack_step: the step of FGSM from a random start, in units of ε.
        attack_steps: number of steps of the method ``pgd``, each of 2.5 ε / ``attack_steps``.
        one_start_per_batch: one random number instead of one per pixel, as in the authors' code.
        stages: number of layer-wise stages that follow (A.6); stage s trains the layers after
            the s-th on adversarial examples in its output.
        stage_epochs: length of each.
        stage_learning_rate: with which each begins; ``stage_milestones`` count from there.
        gradient_clip: largest norm of a step's gradient; inf leaves it as it is.
        augment: random crops of the training images, and flips with ``horizontal_flip``.
        crop_padding: zeros around an image that is cropped at random.
        horizontal_flip: flip with probability ½; not for digits, which become other symbols.
        precision: of the products in training, ``float32``, ``tf32`` (on a GPU) or ``bf16``; all
            else is float32, with ``bf16`` the products of the first layer that trains too if it
            is not the only one, and so is whatever measures or certifies.
        held_out: number of training images set aside to choose the best epoch by.
        pgd_steps, pgd_restarts: strength of the attack in the final evaluation.
        seed: of initialisation, order of the examples, augmentation and attacks.

    Raises:
        SettingError: a value is of the wrong type or out of its range.
    """

    dataset: Annotated[str, TEXT]
    model: Annotated[str, TEXT]
    batch_norm: Annotated[bool, SWITCH] = False
    ibp_initialization: Annotated[bool, SWITCH] = False
    method: Annotated[str, TEXT]
    epsilon: Annotated[float, UNIT]  # ε_train
    evaluation_epsilon: Annotated[float, UNIT]
    epochs: Annotated[int, POSITIVE_INTEGER]
    batch_size: Annotated[int, POSITIVE_INTEGER]
    learning_rate: Annotated[float, RATE]  # η
    reference_fan_in: Annotated[float, NONNEGATIVE] = 0.0
    milestones: Annotated[tuple[float, ...], NONNEGATIVES]
    learning_rate_factor: Annotated[float, FACTOR]
    natural_epochs: Annotated[float, NONNEGATIVE]  # T_nat
    adversarial_epochs: Annotated[float, NONNEGATIVE]  # T_adv
    ramp_epochs: Annotated[float, NONNEGATIVE]  # R
    certified_epochs: Annotated[float, NONNEGATIVE] = 0.0
    first_batch_norm_frozen_from: Annotated[float, LATER] = math.inf
    fosc_maximum: Annotated[float, NONNEGATIVE]  # c_max
    fosc_decay_epochs: Annotated[float, NONNEGATIVE]  # T'
    moment_decay: Annotated[tuple[float, float], DECAYS] = (0.9, 0.99)  # β₁, β₂
    regularization: Annotated[float, NONNEGATIVE] = 0.5  # κ_reg
    preference: Annotated[tuple[float, float], POSITIVE_PAIR] = (1.0, 1.0)  # p
    authors_weights: Annotated[bool, SWITCH] = False
    natural_weight: Annotated[tuple[float, float], UNIT_PAIR] = (1.0, 0.5)
    crown_share: Annotated[tuple[float, float], UNIT_PAIR] = (1.0, 0.0)
    box_regularizers: Annotated[float, NONNEGATIVE] = 0.0
    attack_step: Annotated[float, POSITIVE] = 1.25  # α / ε
    attack_steps: Annotated[int, ATTEMPTS] = 10
    one_start_per_batch: Annotated[bool, SWITCH] = False
    stages: Annotated[int, INTEGER] = 0
    stage_epochs: Annotated[int, POSITIVE_INTEGER] = 1
    stage_learning_rate: Annotated[float, RATE] = 1.25e-4
    stage_milestones: Annotated[tuple[float, ...], NONNEGATIVES] = ()
    gradient_clip: Annotated[float, LIMIT]
    augment: Annotated[bool, SWITCH]
    crop_padding: Annotated[int, INTEGER] = 4
    horizontal_flip: Annotated[bool, SWITCH] = True
    precision: Annotated[str, PRECISION] = "float32"
    held_out: Annotated[int, INTEGER]
    pgd_steps: Annotated[int, ATTEMPTS]
    pgd_restarts: Annotated[int, ATTEMPTS]
    seed: Annotated[int, INTEGER]

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if not rule.admits(value):
                raise SettingError(name, f"expected {rule.expectation}, found {shown(value)}")
            object.__setattr__(self, name, rule.convert(value))
        main = max(self.ramp_epochs, self.certified_epochs)
        needed = self.natural_epochs + self.adversarial_epochs + main
        if needed > self.epochs * (1 + 1e-9):
            raise SettingError(
                "epochs",
                f"expected at least the {needed:g} of warm-up and main phases, "
                f"found {self.epochs} (train --epochs shortens the whole schedule)",
            )

    @property
    def total_epochs(self) -> int:
        """Length of the run with its layer-wise stages."""
        return self.stage_end(self.stages)

    def stage_end(self, stage: int) -> int:
        """The epochs that are done when a stage ends; stage 0 trains the whole network."""
        return self.epochs + stage * self.stage_epochs

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


def as_set(value: object) -> str:
    """What a setting holds, as a user writes it after ``--set``.

    >>> as_set(True), as_set((1.0, 0.5)), as_set(3.0), as_set("advibp")
    ('true', '[1, 0.5]', '3', 'advibp')
    """
    return value if isinstance(value, str) else re.sub(r"\.0\b", "", _to_toml(value))


def _to_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_to_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # printable strings are alike in both
    return repr(value)
