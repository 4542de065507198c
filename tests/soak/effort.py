"""How much is tried."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How much of it.

    Attributes:
        kills: by SIGKILL at random moments, those of the true command line included.
        commands: of the true command line.
        signals: SIGTERM, and as many Ctrl-C.
        every: each so-many-th step of the writes is killed at.
        limits: sizes of a disk that is too small.
        lost: processes killed of two, and as many of three.
        restarts: of them under torchrun.
        epochs: that a network of the digits is trained for, whose certificates are attacked.
        attempts: on these.
        steps: of optimizers, in all cases together.
        mutants: each so-many-th mutant of the bounds is tried.
        test_seconds: of processor time that a test may take to be asked about them.
    """

    kills: int
    commands: int
    signals: int
    every: int
    limits: int
    lost: int
    restarts: int
    epochs: int
    attempts: int
    steps: int
    mutants: int
    test_seconds: float


FULL = Effort(
    kills=200,
    commands=10,
    signals=20,
    every=1,
    limits=8,
    lost=20,
    restarts=5,
    epochs=40,
    attempts=1_000_000,
    steps=100_000,
    mutants=1,
    test_seconds=math.inf,
)
QUICK = Effort(
    kills=4,
    commands=0,
    signals=1,
    every=17,
    limits=1,
    lost=1,
    restarts=0,
    epochs=4,
    attempts=5_000,
    steps=1_000,
    mutants=41,
    test_seconds=0.1,
)
