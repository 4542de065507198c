"""What a study compares: runs of one configuration that differ in how two losses are weighed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mogd import BisectorProjection, Fixed, Record, Rule, UnbiasedMultiGradient
from mogd.gradients import LossGradients
from mogd.moments import Moments
from mogd.packs import norm
from mogd.priority import Priority


@dataclass(frozen=True)
class Variation:
    """One way to train.

    Attributes:
        name: of its rows and run directories.
        family: the line that it lies on in a picture.
        changes: of the study's configuration.
        rule: in place of the method's.
        priority: in place of FOSC's.
        own_batch: whether the weights come from the gradients that they weigh.
        joint: whether it differs from the configuration only once both losses are trained on.
    """

    name: str
    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rule: Rule | None = None
    priority: Priority | None = None
    own_batch: bool = False
    joint: bool = False

    def apply_to(self, optimizer: UnbiasedMultiGradient) -> None:
        """Weigh in this way from the next step on."""
        optimizer.rule = self.rule or optimizer.rule
        optimizer.priority = self.priority or optimizer.priority
        if self.own_batch:
            optimizer.__class__ = OwnBatch


class OwnBatch(UnbiasedMultiGradient):
    """Weighs gradients by themselves, as multi-gradient methods commonly do: biased."""

    def _apply(self, collected: LossGradients, scaler: GradScaler | None) -> Record:
        device = self._device()
        self._past.moments = Moments((0.0, 0.0), len(collected.losses), device)
        norms = torch.stack([norm(gradients, device) for gradients in collected.gradients])
        self._past.moments.update(collected.gradients, norms)
        return super()._apply(collected, scaler)


def ratio(adversarial: float, certified: float) -> str:
    """As names have it.

    >>> ratio(1, 0.5)
    '1 to 0.5'
    """
    return f"{adversarial:g} to {certified:g}"


def weighted_sums(*ratios: tuple[float, float]) -> list[Variation]:
    """The weighted sum by the ratio of its weights; MTL-IBP's α is α = certified ÷ both."""
    return [
        Variation(
            f"weighted sum {ratio(*pair)}",
            "weighted sum",
            {"method": "weighted-sum", "preference": pair},
        )
        for pair in ratios
    ]


def bisectors(*preferences: tuple[float, float]) -> list[Variation]:
    """The paper's rule, leaning in agreement as a preference says."""
    return [
        Variation(f"mogd {ratio(*pair)}", "mogd", {"method": "advibp", "preference": pair})
        for pair in preferences
    ]


def changed_rules(preference: tuple[float, float]) -> list[Variation]:
    """The paper's rule with one thing changed each, at one preference."""
    at = f"mogd {ratio(*preference)}"
    changes = {"method": "advibp", "preference": preference}
    exact = BisectorProjection(preference=preference, length="norm_of_mean")
    return [
        Variation(f"{at}, this batch's gradients", "this batch", changes, own_batch=True),
        Variation(f"{at}, ‖m‖ for v", "‖m‖ for v", changes, rule=exact),
        Variation(f"{at}, adversarial first", "adversarial first", changes, priority=Fixed(0)),
        Variation(f"{at}, no κ_reg", "no κ_reg", changes | {"regularization": 0.0}),
    ]


@dataclass(frozen=True)
class Odds:
    """A priority that knows nothing of the batch: the first loss with a given probability."""

    first: float

    def __call__(self, losses: Tensor) -> Tensor:
        return (torch.rand(()) >= self.first).long()


def shared_priorities(*shares: float) -> list[Variation]:
    """The paper's rule where each loss goes first in a share of the conflicts, at random."""
    return [
        Variation(
            f"mogd, adversarial first in {share:.0%}",
            "mogd, priority by lot",
            {"method": "advibp"},
            priority=Odds(share),
        )
        for share in shares
    ]


def ablations() -> list[Variation]:
    """Whole runs: two fronts, and what differs in one thing from the first."""
    fronts = [
        *bisectors((1, 10), (1, 3), (1, 1), (4, 1)),
        *weighted_sums((1, 4), (1, 1), (2, 1), (4, 1), (8, 1)),
    ]
    exact = BisectorProjection(preference=(1.0, 10.0), length="norm_of_mean")
    later: dict[str, dict[str, Any]] = {
        "no κ_reg": {"regularization": 0.0},
        "c_max 0.0256": {"fosc_maximum": 0.0256},
        "c_max 1e-4": {"fosc_maximum": 1e-4},
        "certified loss alone": {"certified_epochs": 19.7},  # after 0.3 of warm-up
    }
    throughout: dict[str, dict[str, Any]] = {
        "joint after the ramp": {"certified_epochs": 5.7},
        "joint from the start": {"certified_epochs": 0.0},
        "no BatchNorm": {"batch_norm": False},
        "torch's initialisation": {"ibp_initialization": False},
        "no regularisers of boxes": {"box_regularizers": 0.0},
    }
    return [
        *(replace(variation, joint=True) for variation in fronts),
        *(Variation(name, name, changes, joint=True) for name, changes in later.items()),
        Variation("‖m‖ for v", "‖m‖ for v", rule=exact, joint=True),
        Variation("this batch's gradients", "this batch's gradients", own_batch=True, joint=True),
        *(Variation(name, name, changes) for name, changes in throughout.items()),
    ]
