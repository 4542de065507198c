"""How much is tried."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How much of it.

    Attributes:
        steps: of optimizers, in all cases together.
    """

    steps: int


FULL = Effort(steps=100_000)
QUICK = Effort(steps=1_000)
