"""Standard, attacked and verified errors of a network on a set of images."""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from robust_app.attacks import falsified
from robust_app.batches import as_float
from robust_app.error_counts import Errors, Share
from robust_app.layers import applied
from robust_app.precision import plain_float32
from robust_app.verifiers import VERIFIERS

CHUNK = 1000  # images at a time: what fits in memory on any machine
PATIENT_CHUNK = 20  # with verifiers that take seconds for an image: so that progress shows


class Contradiction(Exception):
    """An image is proved robust and yet attacked with success: a bound is not sound."""


@torch.no_grad()
@plain_float32()
def misclassified(network: nn.Module, x: Tensor, labels: Tensor) -> int:
    """How many images are misclassified as they are.

    Args:
        network: in evaluation mode.
        x: images, uint8 or in [0, 1], ``(n, C, H, W)``.
        labels: true classes, int64 ``(n,)``.
    """
    return sum(
        int((applied(network, images).argmax(1) != classes).sum())
        for images, classes in _chunks(x, labels, CHUNK)
    )


@torch.no_grad()
@plain_float32()
def standard_and_certified(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    verifiers: Sequence[str] = ("ibp",),
) -> Tensor:
    """How many images are misclassified and how many certified: int64, shape ``(2,)``.

    Args:
        network: in evaluation mode.
        x: images, uint8 or in [0, 1], ``(n, C, H, W)``.
        labels: true classes, int64 ``(n,)``.
        epsilon: radius ≥ 0 in pixels of [0, 1].
        verifiers: a cascade of bounds; see :func:`evaluate`.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    for images, classes in _chunks(x, labels, CHUNK):
        wrong = applied(network, images).argmax(1) != classes
        proved = torch.zeros_like(wrong)
        for name in verifiers:
            left = ~proved
            if left.any():
                verdict = VERIFIERS[name].decide(
                    network, images[left], classes[left], epsilon, math.inf
                )
                proved[left] = verdict.certified
        counts += torch.stack([wrong.sum(), proved.sum()])
    return counts


@plain_float32()
def evaluate(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    pgd_steps: int,
    pgd_restarts: int,
    seed: int,
    verifiers: Sequence[str] = ("ibp",),
    time_limit: float = 60.0,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Errors:
    """Attack every image, then verify in a cascade.

    The first verifier is asked about all images, each later one about those that neither the
    attack nor a verifier before it has decided.

    Args:
        network: from images to logits ``(batch, classes)``; put in evaluation mode.
        x: images, uint8 or in [0, 1], ``(n, C, H, W)``.
        labels: true classes, int64 ``(n,)``.
        epsilon: radius ≥ 0 in pixels of [0, 1].
        pgd_steps: steps of the attack, at least 1.
        pgd_restarts: attempts of the attack, at least 1.
        seed: of the attack's random starts, which depend on nothing else but an image's place.
        verifiers: keys of :data:`~robust_app.verifiers.VERIFIERS`, at least one.
        time_limit: seconds for an image, of the verifiers that could go on for ever.
        on_batch: told how many images were done, after each batch.

    Raises:
        Contradiction: if the attack succeeds on a certified image.
        UnsupportedLayer: if a verifier has no rule for a layer.
        ValueError: images are not in [0, 1], or labels are no classes of the network.
    """
    network.eval()
    generator = torch.Generator().manual_seed(seed)  # on the CPU: see falsified
    attack, shares = Share(), {name: Share() for name in verifiers}
    patient = tuple(verifiers) != ("ibp",)
    misclassified = attacked = broken_count = certified_count = 0
    for images, classes in _chunks(x, labels, CHUNK):
        started = time.perf_counter()
        with torch.no_grad():
            wrong = applied(network, images).argmax(1) != classes
        broken = wrong | falsified(
            network,
            images,
            classes,
            epsilon,
            steps=pgd_steps,
            restarts=pgd_restarts,
            generator=generator,
        )
        misclassified += int(wrong.sum())
        attacked += int(broken.sum())
        proved = torch.zeros_like(broken)
        _count(attack, proved, broken, started)
        # A product may be rounded otherwise in a batch of another size: the attack's batches must
        # not depend on the verifiers.
        step = PATIENT_CHUNK if patient else CHUNK
        for start in range(0, len(images), step):
            here = slice(start, start + step)
            _verify(
                network,
                images[here],
                classes[here],
                epsilon,
                broken[here],
                proved[here],
                shares,
                time_limit,
            )
            on_batch(len(images[here]))
        broken_count += int(broken.sum())
        certified_count += int(proved.sum())
    shares = {"pgd": attack, **shares}
    return Errors(len(x), misclassified, attacked, broken_count, certified_count, shares)


def _verify(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    broken: Tensor,
    proved: Tensor,
    shares: dict[str, Share],
    time_limit: float,
) -> None:
    """Ask each verifier about the images that are left; note in place what it says."""
    asked = torch.ones_like(broken)  # the first about all, as a check of the bounds
    for name, share in shares.items():
        if not asked.any():
            break
        started = time.perf_counter()
        verdict = VERIFIERS[name].decide(network, x[asked], labels[asked], epsilon, time_limit)
        _count(share, verdict.certified, verdict.falsified & ~broken[asked], started)
        proved[asked] = verdict.certified
        broken[asked] |= verdict.falsified
        if (broken & proved).any():
            raise Contradiction(
                f"{int((broken & proved).sum())} images certified by {name} have "
                f"counterexamples within {epsilon}: a bound is not sound"
            )
        asked = ~(broken | proved)


def _chunks(x: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as floats and their labels, ``size`` at a time."""
    parts = zip(torch.split(x, size), torch.split(labels, size), strict=True)
    return ((as_float(images), classes) for images, classes in parts)


def _count(share: Share, certified: Tensor, falsified: Tensor, started: float) -> None:
    share.examples += len(certified)
    share.certified += int(certified.sum())
    share.falsified += int(falsified.sum())
    share.seconds += time.perf_counter() - started
