"""What an evaluation counted: standard, attacked and verified errors, and who decided what."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Share:
    """What one method of a cascade decided, of the images that those before it left open.

    Attributes:
        examples: number of images it was asked about.
        certified: images it proved.
        falsified: images it found a wrong class for, and none before it did.
        seconds: it took for all of them.
    """

    examples: int = 0
    certified: int = 0
    falsified: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Errors:
    """Counts of one evaluation; errors in percent.

    Attributes:
        examples: number of images.
        misclassified: images with a wrong class as they are.
        attacked: images with a wrong class at a point that PGD found; contains the misclassified.
        falsified: those, and images for which a verifier found such a point.
        certified: images proved to keep the right class in their whole ball.
        shares: what PGD and each verifier contributed, in the order in which they were asked.
    """

    examples: int
    misclassified: int
    attacked: int
    falsified: int
    certified: int
    shares: dict[str, Share]

    @property
    def undecided(self) -> int:
        """Images neither falsified nor certified."""
        return self.examples - self.falsified - self.certified

    @property
    def standard_error(self) -> float:
        """Percentage of misclassified images."""
        return 100 * self.misclassified / self.examples

    @property
    def pgd_error(self) -> float:
        """Percentage of attacked images, a lower bound of the robust error."""
        return 100 * self.attacked / self.examples

    @property
    def verified_error(self) -> float:
        """Percentage of images not certified, an upper bound of the robust error."""
        return 100 * (self.examples - self.certified) / self.examples

    def as_dict(self) -> dict[str, Any]:
        """Counts and percentages, for JSON."""
        return asdict(self) | {
            "undecided": self.undecided,
            "standard_error": self.standard_error,
            "pgd_error": self.pgd_error,
            "verified_error": self.verified_error,
        }
