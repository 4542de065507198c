"""How much a run of the benchmarks does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Sizes of the problems and numbers of repetitions.

    Attributes:
        small, large: names of networks for images of 1x28x28.
        batch: images of a step.
        rounds: of the quick comparisons; of the slow ones a tenth.
        entries: numbers P of parameters that the aggregation is timed at.
        images: of an epoch, held-out ones included.
        held_out: how many of them.
        aims: whether the problems are those that the aims were set for.
    """

    small: str
    large: str
    batch: int
    rounds: int
    entries: tuple[int, ...]
    images: int
    held_out: int
    aims: bool

    @property
    def few(self) -> int:
        """Rounds of a comparison whose turns take seconds."""
        return max(2, self.rounds // 10)

    def aim(self, text: str) -> str:
        """What was promised, where this run can tell."""
        return text if self.aims else ""


FULL = Effort(
    small="dm-small",
    large="dm-large",
    batch=256,
    rounds=40,
    entries=(10**4, 10**5, 10**6, 10**7, 10**8),
    images=60_000,
    held_out=5_000,
    aims=True,
)
QUICK = Effort(
    small="table-f-a",
    large="table-f-b",
    batch=16,
    rounds=3,
    entries=(10**4,),
    images=96,
    held_out=32,
    aims=False,
)
