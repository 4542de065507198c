"""The verifiers by name: what each proves with, and in one signature."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robust_app import certificates, crown, exact
from robust_app.errors import UserError, unknown


class Verdicts(NamedTuple):
    """What a verifier found out about each image; an image in neither is undecided.

    Attributes:
        certified: proved to keep the right class in the whole ball, bool ``(batch,)``.
        falsified: with a wrong class somewhere in the ball, bool ``(batch,)``.
    """

    certified: Tensor
    falsified: Tensor


@dataclass(frozen=True)
class Verifier:
    """A way to decide about images.

    Attributes:
        description: one line for the user.
        decide: from network, images in [0, 1], labels, ε, and seconds for each image to verdicts.
    """

    description: str
    decide: Callable[[nn.Module, Tensor, Tensor, float, float], Verdicts]


Prove = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


def _by_bounds(description: str, prove: Prove) -> Verifier:
    """Bounds prove or say nothing, and take the time they take."""

    def decide(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float, _: float) -> Verdicts:
        certified = prove(network, x, labels, epsilon)
        return Verdicts(certified, torch.zeros_like(certified))

    return Verifier(description, decide)


def _exactly(
    network: nn.Module, x: Tensor, labels: Tensor, epsilon: float, seconds: float
) -> Verdicts:
    return Verdicts(*exact.decided(network, x, labels, epsilon, time_limit=seconds))


VERIFIERS: Mapping[str, Verifier] = {
    "ibp": _by_bounds("interval bounds", certificates.certified),
    "crown-ibp": _by_bounds(
        "linear relaxation from the margins down, interval bounds at the ReLUs", crown.crown_ibp
    ),
    "alpha-crown-ibp": _by_bounds(
        "crown-ibp with optimised lower slopes of the ReLUs", crown.alpha_crown_ibp
    ),
    "crown": _by_bounds("linear relaxation from every layer down", crown.crown),
    "alpha-crown": _by_bounds("crown with optimised lower slopes of the ReLUs", crown.alpha_crown),
    "exact": Verifier("mixed-integer programming, complete but for --time-limit", _exactly),
}


def parse(names: str) -> tuple[str, ...]:
    """The verifiers of a cascade, from their names with commas in between.

    Raises:
        UserError: a name is unknown, or there twice.

    >>> parse("ibp,crown")
    ('ibp', 'crown')
    """
    found = tuple(name.strip() for name in names.split(","))
    for name in found:
        if name not in VERIFIERS:
            raise unknown("verifier", name, VERIFIERS)
        if found.count(name) > 1:
            raise UserError(f"--verifier: expected each name once, found {names}")
    return found
