"""What changes while a network trains, as pure functions of the time t in epochs.

``t`` is fractional inside an epoch: 2.5 is the middle of the third. Algorithm 2 of the paper
starts counting when the warm-up ends, so the ramp of ε and c_t take ``t - (T_nat + T_adv)``;
:func:`step_decay` and :func:`phase` count from the first epoch of the run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from robust_app.config import Config


class Phase(Enum):
    """Which losses an epoch trains on (Algorithm 2, procedure WARMUP, then its main loop)."""

    NATURAL = "natural"
    ADVERSARIAL = "adversarial"
    CERTIFIED = "certified"  # alone, where the config asks for it
    MAIN = "main"


def phase(
    t: float, natural_epochs: float, adversarial_epochs: float, certified_epochs: float = 0
) -> Phase:
    """The phase at time t ≥ 0: natural for T_nat epochs, adversarial for T_adv, then main.

    ``certified_epochs`` put the certified loss alone in between.

    >>> [phase(t, natural_epochs=1, adversarial_epochs=2).value for t in (0.5, 1, 3)]
    ['natural', 'adversarial', 'main']
    """
    if t < natural_epochs:
        return Phase.NATURAL
    if t < natural_epochs + adversarial_epochs:
        return Phase.ADVERSARIAL
    if t < natural_epochs + adversarial_epochs + certified_epochs:
        return Phase.CERTIFIED
    return Phase.MAIN


def smoothed_ramp(t: float, length: float, middle: float = 0.25, power: float = 4.0) -> float:
    """The share of the final ε in use at time t, in [0, 1]; RAMPUP_SCHEDULER of Algorithm 2.

    With u = t / length it grows as a power, c·u^power, up to u = ``middle`` and from there on a
    straight line that continues value and slope and reaches 1 at u = 1: the smoothed schedule
    common since IBP and CROWN-IBP training. It is 0 for t ≤ 0 and 1 from t = length on; a
    ``length`` (R) of 0 is a jump at t = 0. ``middle`` lies in [0, 1] and ``power`` is at least 1.

    >>> [round(smoothed_ramp(t, length=8), 4) for t in (0, 1, 2, 4, 8)]
    [0.0, 0.0048, 0.0769, 0.3846, 1.0]
    """
    if t >= length:
        return 1.0
    if t <= 0:
        return 0.0
    u = t / length
    # c·middle^power, with c from matching the slopes; this form has no 0/0 at middle = 0.
    at_middle = middle / (middle + power * (1 - middle))
    if u < middle:
        return at_middle * math.pow(u / middle, power)
    return min(1.0, at_middle + (1 - at_middle) * (u - middle) / (1 - middle))


def fosc_threshold(t: float, maximum: float, start: float, decay: float) -> float:
    """c_t, the first-order stationarity an adversarial input may have, in [0, ``maximum``].

    Algorithm 2, line 4: clip(c_max − (t − R)·c_max / T', 0, c_max) with ``maximum`` c_max,
    ``start`` R and ``decay`` T'. A ``decay`` of 0 is a drop to 0 at ``start``.

    >>> [fosc_threshold(t, maximum=0.5, start=10, decay=20) for t in (0, 10, 20, 30, 99)]
    [0.5, 0.5, 0.25, 0.0, 0.0]
    """
    if decay == 0:
        return float(maximum) if t < start else 0.0
    return float(min(max(maximum - (t - start) * maximum / decay, 0.0), maximum))


def step_decay(t: float, initial: float, milestones: Sequence[float], factor: float) -> float:
    """The learning rate at time t: ``initial`` times ``factor`` for each milestone reached.

    >>> [step_decay(t, initial=1.0, milestones=(2, 4), factor=0.5) for t in (1.5, 2, 4)]
    [1.0, 0.5, 0.25]
    """
    return float(initial * factor ** sum(milestone <= t for milestone in milestones))


def between(ends: tuple[float, float], share: float) -> float:
    """From the first number at share 0 to the second at share 1, in proportion.

    The weight κ of the natural loss and the share β of CROWN bounds follow ε in this way
    (Zhang et al., section 3).

    >>> between((1.0, 0.5), share=0.5)
    0.75
    """
    return ends[0] + (ends[1] - ends[0]) * share


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the schedules say at one moment of a run.

    Attributes:
        stage: 0 while the whole network trains, s in the s-th layer-wise stage.
        phase: which losses are trained on.
        epsilon: ε_t in pixels of [0, 1].
        fosc_threshold: c_t.
        learning_rate: η_t.
        natural_weight: κ of the methods that add the natural to the certified loss.
        crown_share: β of the methods that mix CROWN-IBP with interval bounds.
        box_regularizers: weight of the two regularisers of boxes.
        first_batch_norm_frozen: whether the first BatchNorm layer keeps its statistics; never in
            layer-wise stages, where there is none.
    """

    stage: int = 0
    phase: Phase
    epsilon: float
    fosc_threshold: float
    learning_rate: float
    natural_weight: float
    crown_share: float
    box_regularizers: float
    first_batch_norm_frozen: bool = False


def setting(config: Config, t: float) -> Setting:
    """All schedules of a run at ``t`` epochs from its start."""
    if t >= config.epochs and config.stages:
        return _stage_setting(config, t - config.epochs)
    since_warm_up = t - config.natural_epochs - config.adversarial_epochs
    now = phase(
        t,
        config.natural_epochs,
        config.adversarial_epochs,
        config.certified_epochs,
    )
    ramp = smoothed_ramp(since_warm_up, config.ramp_epochs)
    share = {Phase.NATURAL: 0.0, Phase.ADVERSARIAL: 1.0}.get(now, ramp)
    return Setting(
        phase=now,
        epsilon=share * config.epsilon,
        fosc_threshold=fosc_threshold(
            since_warm_up, config.fosc_maximum, config.ramp_epochs, config.fosc_decay_epochs
        ),
        learning_rate=step_decay(
            t, config.learning_rate, config.milestones, config.learning_rate_factor
        ),
        natural_weight=between(config.natural_weight, ramp),
        crown_share=between(config.crown_share, ramp),
        box_regularizers=config.box_regularizers * (1 - ramp),
        first_batch_norm_frozen=t >= config.first_batch_norm_frozen_from,
    )


def _stage_setting(config: Config, t: float) -> Setting:
    """A layer-wise stage is trained at ε_train and c_t = 0 from its first epoch on (A.6)."""
    stage, since_start = divmod(t, config.stage_epochs)
    return Setting(
        stage=1 + int(stage),
        phase=Phase.MAIN,
        epsilon=config.epsilon,
        fosc_threshold=0.0,
        learning_rate=step_decay(
            since_start,
            config.stage_learning_rate,
            config.stage_milestones,
            config.learning_rate_factor,
        ),
        natural_weight=config.natural_weight[1],
        crown_share=config.crown_share[1],
        box_regularizers=0.0,
    )
