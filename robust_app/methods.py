"""The methods: which losses a step has, and the rule that weighs them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from mogd import BisectorProjection, Constant, Rule
from robust_app.attacks import fgsm
from robust_app.config import Config
from robust_app.errors import unknown
from robust_app.fosc import Stationarity


@dataclass(frozen=True)
class Batch:
    """What a step trains on.

    Attributes:
        x: images in [0, 1], ``(batch, C, H, W)``.
        labels: true classes, int64 ``(batch,)``.
        start: random start of the attack, in units of ε, entries in [-1, 1], like ``x``.
        epsilon: radius in pixels of [0, 1], 0-dim.
    """

    x: Tensor
    labels: Tensor
    start: Tensor
    epsilon: Tensor


@dataclass(frozen=True)
class Method:
    """A way to train on the adversarial and the certified loss together.

    Attributes:
        description: one line for the user.
        rule: what weighs the two losses.
    """

    description: str
    rule: Callable[[Config], Rule]


LOSSES = ("adversarial", "certified")

METHODS = {
    "advibp": Method(
        "adversarial + IBP loss, bisector or projection by moments, FOSC priority (Algorithm 2)",
        lambda config: BisectorProjection(config.regularization),
    ),
    "weighted-sum": Method(
        "adversarial + IBP loss, weights 1 and 1: the baseline of Figure 2",
        lambda _: Constant((1.0, 1.0)),
    ),
}


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: if there is none; names the nearest.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def attack(network: nn.Module, batch: Batch, step: float) -> Tensor:
    """FGSM with random initialisation, as a leaf whose gradient will be wanted.

    Args:
        network: what is attacked.
        batch: images, labels, start and ε.
        step: step size in units of ε.
    """
    x_adv = fgsm(
        network,
        batch.x,
        batch.labels,
        batch.epsilon,
        start=batch.start,
        step_size=step * batch.epsilon,
    )
    return x_adv.requires_grad_()


def joint_losses(
    objective: Callable[..., Tensor],
    network: nn.Module,
    batch: Batch,
    attack_step: float,
    stationarity: Stationarity,
) -> Iterator[Tensor]:
    """The adversarial, then the certified loss, each made when it is asked for.

    Args:
        objective: an :class:`~robust_app.losses.Objective`, bare or wrapped for many processes.
        network: the network inside it.
        batch: images, labels, start and ε_t.
        attack_step: step size of FGSM in units of ε.
        stationarity: told of the adversarial examples, for the priority.

    Source: paper, Algorithm 2, lines 5-11.
    """
    x_adv = attack(network, batch, attack_step)
    stationarity.observe(batch.x, x_adv, batch.epsilon)
    yield objective(x_adv, batch.labels)
    yield objective(batch.x, batch.labels, batch.epsilon)
