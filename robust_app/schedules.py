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
    JOINT = "joint"


def phase(t: float, natural_epochs: float, adversarial_epochs: float) -> Phase:
    """The phase at time t ≥ 0: natural for T_nat epochs, adversarial for T_adv, then joint.

    >>> [phase(t, natural_epochs=1, adversarial_epochs=2).value for t in (0.5, 1, 3)]
    ['natural', 'adversarial', 'joint']
    """
    if t < natural_epochs:
        return Phase.NATURAL
    if t < natural_epochs + adversarial_epochs:
        return Phase.ADVERSARIAL
    return Phase.JOINT


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


@dataclass(frozen=True)
class Setting:
    """What the schedules say at one moment of a run.

    Attributes:
        phase: which losses are trained on.
        epsilon: ε_t in pixels of [0, 1].
        fosc_threshold: c_t.
        learning_rate: η_t.
    """

    phase: Phase
    epsilon: float
    fosc_threshold: float
    learning_rate: float


def setting(config: Config, t: float) -> Setting:
    """All schedules of a run at ``t`` epochs from its start."""
    since_warm_up = t - config.natural_epochs - config.adversarial_epochs
    now = phase(t, config.natural_epochs, config.adversarial_epochs)
    ramp = smoothed_ramp(since_warm_up, config.ramp_epochs)
    share = {Phase.NATURAL: 0.0, Phase.ADVERSARIAL: 1.0, Phase.JOINT: ramp}[now]
    threshold = fosc_threshold(
        since_warm_up, config.fosc_maximum, config.ramp_epochs, config.fosc_decay_epochs
    )
    learning_rate = step_decay(
        t, config.learning_rate, config.milestones, config.learning_rate_factor
    )
    return Setting(now, share * config.epsilon, threshold, learning_rate)
