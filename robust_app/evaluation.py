"""Standard, attacked and verified errors of a network on a set of images."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_app.attacks import falsified
from robust_app.batches import as_float
from robust_app.bounds import certified

Verifier = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
"""From network, images, labels and ε to whether each image is proved robust, bool ``(batch,)``."""

CHUNK = 1000  # images at a time: what fits in memory on any machine

VERIFIERS: Mapping[str, Verifier] = {"ibp": certified}


@dataclass(frozen=True)
class Errors:
    """Counts of one evaluation; errors in percent.

    Attributes:
        examples: number of images.
        misclassified: images with a wrong class as they are.
        falsified: images with a wrong class somewhere in their ball, found by the attack; contains
            the misclassified.
        certified: images proved to keep the right class in their whole ball.
    """

    examples: int
    misclassified: int
    falsified: int
    certified: int

    @property
    def undecided(self) -> int:
        """Images neither falsified nor certified."""
        return self.examples - self.falsified - self.certified

    @property
    def standard(self) -> float:
        """Percentage of misclassified images."""
        return 100 * self.misclassified / self.examples

    @property
    def attacked(self) -> float:
        """PGD error: percentage of falsified images, a lower bound of the robust error."""
        return 100 * self.falsified / self.examples

    @property
    def verified(self) -> float:
        """Percentage of images not certified, an upper bound of the robust error."""
        return 100 * (self.examples - self.certified) / self.examples

    def as_dict(self) -> dict[str, Any]:
        """Counts and percentages, for JSON."""
        return asdict(self) | {
            "undecided": self.undecided,
            "standard_error": self.standard,
            "pgd_error": self.attacked,
            "verified_error": self.verified,
        }


class Contradiction(Exception):
    """An image is proved robust and yet attacked with success: a bound is not sound."""


@torch.no_grad()
def standard_and_certified(
    network: nn.Module, x: Tensor, labels: Tensor, epsilon: float, verifier: Verifier = certified
) -> Tensor:
    """How many images are misclassified and how many certified: int64, shape ``(2,)``.

    Args:
        network: in evaluation mode.
        x: images, uint8 or in [0, 1], ``(n, C, H, W)``.
        labels: true classes, int64 ``(n,)``.
        epsilon: radius ≥ 0 in pixels of [0, 1].
        verifier: what proves.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    for images, classes in zip(torch.split(x, CHUNK), torch.split(labels, CHUNK), strict=True):
        images = as_float(images)
        counts[0] += (network(images).argmax(1) != classes).sum()
        counts[1] += verifier(network, images, classes, epsilon).sum()
    return counts


def evaluate(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    pgd_steps: int,
    pgd_restarts: int,
    seed: int,
    verifier: Verifier = certified,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Errors:
    """Attack and verify every image.

    Args:
        network: from images to logits ``(batch, classes)``; put in evaluation mode.
        x: images, uint8 or in [0, 1], ``(n, C, H, W)``.
        labels: true classes, int64 ``(n,)``.
        epsilon: radius ≥ 0 in pixels of [0, 1].
        pgd_steps: steps of the attack, at least 1.
        pgd_restarts: attempts of the attack, at least 1.
        seed: of the attack's random starts.
        verifier: what proves.
        on_batch: told how many images were done, after each batch.

    Raises:
        Contradiction: if the attack succeeds on a certified image.
        UnsupportedLayer: if the verifier has no rule for a layer.
    """
    network.eval()
    generator = torch.Generator(x.device).manual_seed(seed)
    misclassified = broken_count = certified_count = 0
    for images, classes in zip(torch.split(x, CHUNK), torch.split(labels, CHUNK), strict=True):
        images = as_float(images)
        with torch.no_grad():
            wrong = network(images).argmax(1) != classes
            proved = verifier(network, images, classes, epsilon)
        broken = falsified(
            network,
            images,
            classes,
            epsilon,
            steps=pgd_steps,
            restarts=pgd_restarts,
            generator=generator,
        )
        broken |= wrong
        if (broken & proved).any():
            raise Contradiction(
                f"{int((broken & proved).sum())} certified images have counterexamples within "
                f"{epsilon}: a bound is not sound"
            )
        misclassified += int(wrong.sum())
        broken_count += int(broken.sum())
        certified_count += int(proved.sum())
        on_batch(len(images))
    return Errors(len(x), misclassified, broken_count, certified_count)
