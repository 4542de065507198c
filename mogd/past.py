"""What an optimizer keeps of past steps, and which gradients it keeps it of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mogd.arguments import decays
from mogd.moments import Moments
from mogd.packs import Gradients


class Past:
    """The moments of K losses, once there are some, and what they are made with.

    Args:
        decay: β₁ of the gradients' moments and β₂ of their norms', each in [0, 1).
        weigh_by: the parameters whose gradients are kept; all if None.

    Attributes:
        decay: as given.
        weigh_by: as given.
        moments: None before the first step.
    """

    def __init__(self, decay: tuple[float, float], weigh_by: frozenset[Tensor] | None) -> None:
        self.decay, self.weigh_by = decay, weigh_by
        self.moments: Moments | None = None

    def of(self, losses: int, device: torch.device) -> Moments:
        """The moments of K losses; all 0 before the first step."""
        return self.moments or Moments(self.decay, losses, device)

    def check_number(self, losses: int) -> None:
        """Check that there are as many losses as before.

        Raises:
            ValueError: if there are more, or less.
        """
        if self.moments is not None and self.moments.losses != losses:
            raise ValueError(
                f"losses must be {self.moments.losses} as before, or as in the state that was "
                f"loaded, got {losses}: for others make a new optimizer, whose base may load the "
                "state of this one's"
            )

    def check_reached(self, gradients: Sequence[Gradients]) -> None:
        """Check that each of K losses has a gradient to be weighed by.

        Raises:
            ValueError: if one has none, which the rule would take for a gradient of 0.
        """
        for index, of_loss in enumerate(gradients):
            if self.weigh_by is not None and self.weigh_by.isdisjoint(of_loss):
                raise ValueError(
                    f"losses[{index}] reaches none of the parameters in weigh_by: "
                    "there is no gradient to weigh it by"
                )

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The state as tensors and plain containers, parameters by their position."""
        moments = None if self.moments is None else self.moments.state_dict(parameters)
        return {"moments": moments, "moment_decay": list(self.decay)}

    def loaded(
        self, state_dict: dict[str, Any], parameters: Sequence[Tensor], device: torch.device
    ) -> "Past":
        """The past that :meth:`state_dict` described, of the gradients that are kept here.

        Raises:
            ValueError: if an entry is missing or does not fit the parameters.
        """
        past = Past(decays(state_dict["moment_decay"]), self.weigh_by)
        if state_dict["moments"] is None:
            return past
        moments = Moments.from_state_dict(state_dict["moments"], past.decay, parameters, device)
        if past.weigh_by is not None and not past.weigh_by.issuperset(moments.parameters):
            raise ValueError(
                "state_dict['moments'] has parameters that are not in weigh_by: "
                "the state is of another weigh_by"
            )
        past.moments = moments
        return past
