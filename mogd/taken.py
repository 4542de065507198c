"""Gradients that no step was taken along, and that ``backward`` would replace."""

import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from mogd.shards import local

LOST_GRADIENT = """\
backward() replaces what .grad holds, along which this optimizer took no step, or which was \
changed since: gather micro-batches inside accumulate(), add penalties to the losses, and call \
step() or zero_grad() between two backward()"""


class Taken:
    """The gradients that may be replaced: a step was taken along them, or they are zero.

    They are told by identity, and not kept alive. What is added to one in place, and zeros that
    others write, are seen on the CPU alone: elsewhere looking would wait for the device.

    Args:
        parameters: the gradients that these have now may be replaced.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        gradients = (parameter.grad for parameter in parameters)
        self._versions: dict[int, tuple[weakref.ref[Tensor], int]] = {
            id(gradient): (weakref.ref(gradient), _version(local(gradient)))
            for gradient in gradients
            if gradient is not None
        }

    def warn_of_others(self, parameters: Iterable[Tensor]) -> None:
        """Warn if the parameters have any that may not be replaced."""
        gradients = (parameter.grad for parameter in parameters)
        if any(gradient is not None and self._is_lost(gradient) for gradient in gradients):
            warnings.warn(LOST_GRADIENT, stacklevel=5)  # who calls backward, past its decorator

    def _is_lost(self, gradient: Tensor) -> bool:
        reference, version = self._versions.get(id(gradient), (None, 0))
        noted = reference is not None and reference() is gradient
        here = local(gradient)
        if not here.is_cpu:
            return not noted
        changed = not noted or _version(here) != version
        return changed and (here.layout is not torch.strided or bool(here.any()))


def _version(gradient: Tensor) -> int:
    """How often it was changed in place, as far as torch counts: not in inference mode.

    Of views that is counted for all of what they share, which tells nothing of one.
    """
    return 0 if gradient.is_inference() or gradient._is_view() else gradient._version
