"""The methods: which losses a step has, what attacks, and the rule that weighs the losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mogd import BisectorProjection, Constant, Rule
from robust_app.authors import AuthorsWeights
from robust_app.config import Config
from robust_app.errors import unknown
from robust_app.schedules import Phase


class Attack(NamedTuple):
    """How adversarial examples are made.

    Attributes:
        steps: of gradient ascent.
        step: size of each in units of ε.
        random_start: whether from a random point of the ball, not from its centre.
    """

    steps: int
    step: float
    random_start: bool = True


def fgsm(_: Config) -> Attack:
    """FGSM from the image itself (Goodfellow et al.)."""
    return Attack(steps=1, step=1.0, random_start=False)


def fgsm_random(config: Config) -> Attack:
    """FGSM from a random start (Wong et al.), the paper's."""
    return Attack(steps=1, step=config.attack_step)


def pgd(config: Config) -> Attack:
    """Several steps from a random start, together 2.5 ε long (Madry et al.)."""
    return Attack(steps=config.attack_steps, step=2.5 / config.attack_steps)


def paper_rule(config: Config) -> Rule:
    """The paper's weights, or those of its authors' code."""
    if config.authors_weights:
        return AuthorsWeights(config.regularization)
    return BisectorProjection(config.regularization, config.preference)


def constant_weights(config: Config) -> Rule:
    """The sum of both losses, each times its preference."""
    return Constant(config.preference)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a step of the main phase does.

    Attributes:
        description: one line for the user.
        losses: by name; see :class:`robust_app.steps.Losses`.
        rule: what weighs two losses by their past; None where there is one loss.
        attack: what makes adversarial examples.
        crown: whether the certified loss mixes CROWN-IBP bounds in.
    """

    description: str
    losses: tuple[str, ...]
    rule: Callable[[Config], Rule] | None = None
    attack: Callable[[Config], Attack] = fgsm_random
    crown: bool = False

    @property
    def has_radius(self) -> bool:
        """Whether any loss reads ε."""
        return self.losses != ("natural",)


JOINT = ("adversarial", "certified")

METHODS: Mapping[str, Method] = {
    "natural": Method(description="the natural loss alone", losses=("natural",)),
    "fgsm": Method(
        description="adversarial loss, FGSM from the image itself",
        losses=("adversarial",),
        attack=fgsm,
    ),
    "fgsm-random": Method(
        description="adversarial loss, FGSM from a random start", losses=("adversarial",)
    ),
    "pgd": Method(
        description="adversarial loss, PGD from a random start",
        losses=("adversarial",),
        attack=pgd,
    ),
    "ibp": Method(
        description="natural + IBP loss, weights scheduled with ε (Gowal et al.)",
        losses=("mixed",),
    ),
    "crown-ibp": Method(
        description="natural + CROWN-IBP loss, weights and bounds scheduled (Zhang et al.)",
        losses=("mixed",),
        crown=True,
    ),
    "diffai": Method(
        description="natural + IBP loss, fixed weights (after DIFFAI, without zonotopes)",
        losses=("mixed",),
    ),
    "latent-adversarial": Method(
        description="adversarial loss inside boxes, layer by layer (after COLT, without zonotopes)",
        losses=("adversarial",),
    ),
    "weighted-sum": Method(
        description="adversarial + IBP loss, fixed weights: the baseline of Figure 2",
        losses=JOINT,
        rule=constant_weights,
    ),
    "advibp": Method(
        description="adversarial + IBP loss, weights by moments, FOSC priority (Algorithm 2)",
        losses=JOINT,
        rule=paper_rule,
    ),
    "advcrown-ibp": Method(
        description="AdvIBP with CROWN-IBP bounds mixed in during the ramp",
        losses=JOINT,
        rule=paper_rule,
        crown=True,
    ),
}


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: if there is none; names the nearest, or the command that lists them.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def losses_of(method: Method, phase: Phase) -> tuple[str, ...]:
    """The losses that a step of a phase trains on."""
    return method.losses if phase is Phase.MAIN else (phase.value,)


def verifiers_of(config: Config) -> tuple[str, ...]:
    """The cascade that a run's networks are meant for: what the end of training bounds with."""
    by_relaxation = find(config.method).crown and config.crown_share[1] > 0
    return ("ibp", "crown-ibp") if by_relaxation else ("ibp",)
