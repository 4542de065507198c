"""Gradients that no step was taken along, and that ``backward`` would replace."""

import warnings
import weakref
from collections.abc import Iterable

from torch import Tensor

LOST_GRADIENT = """\
backward() replaces what .grad holds, along which this optimizer took no step: gather \
micro-batches inside accumulate(), add penalties to the losses, and call step() or zero_grad() \
between two backward()"""


class Taken:
    """The gradients that may be replaced: a step was taken along them, or they were set to zero.

    They are told by identity and not kept alive: what a plain ``backward`` adds to one in place
    is not seen.
    """

    def __init__(self) -> None:
        self._gradients: list[weakref.ref[Tensor]] = []

    def note(self, parameters: Iterable[Tensor]) -> None:
        """Those that the parameters have now."""
        gradients = (parameter.grad for parameter in parameters)
        self._gradients = [weakref.ref(gradient) for gradient in gradients if gradient is not None]

    def warn_of_others(self, parameters: Iterable[Tensor]) -> None:
        """Warn if the parameters have any that was not noted."""
        taken = {id(reference()) for reference in self._gradients}
        gradients = (parameter.grad for parameter in parameters)
        if any(gradient is not None and id(gradient) not in taken for gradient in gradients):
            warnings.warn(LOST_GRADIENT, stacklevel=5)  # who calls backward, past its decorator
