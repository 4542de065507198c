"""What one step of training differentiates (paper, Algorithm 2, lines 5-11)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_app import attacks
from robust_app.batch_norm import clean_statistics
from robust_app.bounds import propagate
from robust_app.folding import merged
from robust_app.fosc import Stationarity
from robust_app.interval import Interval
from robust_app.losses import certified_loss
from robust_app.methods import Attack, Method
from robust_app.precision import Evaluate, at_least_float32


@dataclass(frozen=True)
class Batch:
    """What a step trains on: points, and what surrounds them.

    Attributes:
        x: clean inputs of the layers that train, ``(batch, ...)``.
        labels: true classes, int64 ``(batch,)``.
        box: what the certified loss is to hold on, of the shape of ``x``.
        center: what the attack starts around, of the shape of ``x``.
        radius: how far it may go: 0-dim, or of the shape of ``x``.
        domain: least and largest entry of what it may find.
        start: its random start in units of the radius, entries in [-1, 1], like ``x``.
    """

    x: Tensor
    labels: Tensor
    box: Interval
    center: Tensor
    radius: Tensor
    domain: tuple[float, float]
    start: Tensor

    @classmethod
    def of_images(cls, x: Tensor, labels: Tensor, start: Tensor, epsilon: Tensor) -> "Batch":
        """Images in [0, 1], ``(batch, C, H, W)``, and their balls of radius ε, 0-dim."""
        box = Interval.around(x, epsilon)
        return cls(x, labels, box, x, epsilon, attacks.IMAGES, start)

    @classmethod
    @torch.no_grad()
    def of_hidden(
        cls, before: nn.Module, x: Tensor, labels: Tensor, start: Tensor, epsilon: Tensor
    ) -> "Batch":
        """What layers make of images and of their balls, a radius for each neuron (A.6).

        Args:
            before: the layers, in evaluation mode.
            x: images in [0, 1], ``(batch, C, H, W)``.
            labels: true classes, int64 ``(batch,)``.
            start: like the layers' outputs.
            epsilon: 0-dim.
        """
        box = propagate(before, Interval.around(x, epsilon))
        return cls(before(x), labels, box, box.center, box.radius, attacks.ANYTHING, start)


class Shares(Protocol):
    """The weights of a loss's parts, as of a :class:`~robust_app.schedules.Setting`.

    A part whose weight is the number 0 is not computed. The value of a 0-dim tensor is not looked
    at, so that it may live on a device and change between two runs of the same operations.
    """

    @property
    def natural_weight(self) -> float | Tensor:
        """κ of the natural loss in the mixed one, in [0, 1]."""

    @property
    def crown_share(self) -> float | Tensor:
        """β of CROWN-IBP bounds, in [0, 1]."""

    @property
    def box_regularizers(self) -> float | Tensor:
        """Of the two regularisers of boxes, at least 0."""


class Losses:
    """Makes the losses of a step, each when it is asked for.

    Args:
        objective: an :class:`~robust_app.losses.Objective`, bare or wrapped for many processes.
        network: the layers inside it.
        method: says what the losses consist of.
        attack: how adversarial examples are made.
        stationarity: told of the adversarial examples, for the priority.
    """

    def __init__(
        self,
        objective: Evaluate,
        network: nn.Module,
        method: Method,
        attack: Attack,
        stationarity: Stationarity,
    ) -> None:
        self.objective, self.network = objective, network
        self.method, self.attack = method, attack
        self.stationarity = stationarity
        self._by_name: dict[str, Callable[[Batch, Shares], Tensor]] = {
            "natural": self.natural,
            "adversarial": self.adversarial,
            "certified": self.certified,
            "mixed": self.mixed,
        }

    def of(self, names: Sequence[str], batch: Batch, now: Shares) -> Iterator[Tensor]:
        """The losses of these names, 0-dim means over the batch."""
        return (self._by_name[name](batch, now) for name in names)

    def natural(self, batch: Batch, now: Shares) -> Tensor:
        """The cross entropy at the clean inputs."""

        def loss(network: nn.Module) -> Tensor:
            with clean_statistics(network, batch.x) as logits:
                return F.cross_entropy(at_least_float32(logits()), batch.labels)

        return self.objective(loss)

    def adversarial(self, batch: Batch, now: Shares) -> Tensor:
        """The cross entropy at adversarial examples, which are leaves with a gradient."""

        def loss(network: nn.Module) -> Tensor:
            with clean_statistics(network, batch.x):
                # In here the attack needs no clean pass of its own. It asks for the gradient of
                # its input alone, so that none reaches the parameters or the statistics.
                layers = merged(network)
                x_adv = self.adversarial_examples(layers, batch).requires_grad_()
                self.stationarity.observe(batch.center, x_adv, batch.radius)
                return F.cross_entropy(at_least_float32(layers(x_adv)), batch.labels)

        return self.objective(loss)

    def certified(self, batch: Batch, now: Shares) -> Tensor:
        """The cross entropy of the worst margins in the box."""

        def loss(network: nn.Module) -> Tensor:
            with clean_statistics(network, batch.x):
                return self._certified(network, batch, now)

        return self.objective(loss)

    def mixed(self, batch: Batch, now: Shares) -> Tensor:
        """κ natural + (1 - κ) certified (paper, equation 3), and the regularisers as they are."""
        share = now.natural_weight

        def loss(network: nn.Module) -> Tensor:
            with clean_statistics(network, batch.x) as logits:
                total = torch.zeros((), device=batch.x.device)
                if _some(share):
                    natural = F.cross_entropy(at_least_float32(logits()), batch.labels)
                    total = total + share * natural
                if _some(1 - share) or _some(now.box_regularizers):
                    total = total + self._certified(network, batch, now, 1 - share)
                return total

        return self.objective(loss)

    @torch.no_grad()
    def adversarial_examples(self, network: nn.Module, batch: Batch) -> Tensor:
        """Found by the method's attack; detached, like ``batch.x``.

        Args:
            network: the layers that train, with statistics where BatchNorm needs them.
            batch: says where to look.
        """
        steps, step, random_start = self.attack
        start = batch.start if random_start else torch.zeros_like(batch.start)
        return attacks.pgd(
            network,
            batch.center,
            batch.labels,
            batch.radius,
            start=start,
            steps=steps,
            step_size=step * batch.radius,
            domain=batch.domain,
        )

    def _certified(
        self, network: nn.Module, batch: Batch, now: Shares, weight: float | Tensor = 1.0
    ) -> Tensor:
        return certified_loss(
            merged(network),
            batch.box,
            batch.labels,
            crown_share=now.crown_share if self.method.crown else 0.0,
            box_regularizers=now.box_regularizers,
            weight=weight,
        )


def _some(weight: float | Tensor) -> bool:
    """Whether there is anything of a part with this weight."""
    return isinstance(weight, Tensor) or weight > 0
