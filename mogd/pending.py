"""What a call of the optimizer leaves for the next one."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from mogd.gradients import LossGradients
from mogd.taken import Taken

UNCOMBINED = """\
gradients were accumulated but not combined: the last backward() before step() belongs outside \
accumulate()"""


class Pending:
    """What stands between ``backward`` and ``step``: nothing at first, and after each step.

    Args:
        parameters: their present gradients are nobody's to lose.

    Attributes:
        gathered: micro-batches that were not combined yet; None without.
        keep: whether the base may step along ``.grad``; a tensor to keep it on the device.
        taken: the gradients that may be replaced.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.gathered: LossGradients | None = None
        self.keep: Tensor | bool = True
        self.taken = Taken(parameters)

    def take_gathered(self) -> LossGradients:
        """The micro-batches to add to, which are then no longer pending."""
        gathered, self.gathered = self.gathered or LossGradients(), None
        return gathered

    def check_combined(self) -> None:
        """Check that no micro-batch is left.

        Raises:
            RuntimeError: if one is.
        """
        if self.gathered is not None:
            raise RuntimeError(UNCOMBINED)

    def may_step(self, parameters: Sequence[Tensor]) -> Tensor | bool:
        """:attr:`keep`; after a step that was dropped, whether a plain backward left gradients."""
        if self.keep is False:
            return any(parameter.grad is not None for parameter in parameters)
        return self.keep

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"taken": Taken()}  # which gradients these are is not for a copy
