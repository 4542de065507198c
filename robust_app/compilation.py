"""The losses of a step, with their gradients, as graphs that torch.compile fuses.

Bounds find their rules by the types of layers, BatchNorm keeps its statistics in its layers, and
some operations have derivatives of their own: Python that no compiler needs to understand. A loss
is differentiated once to note all operations down to the gradients, and these are compiled.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from robust_app.batch_norm import batch_norms
from robust_app.interval import Interval
from robust_app.losses import Objective
from robust_app.steps import Batch, Losses, Shares


@dataclass(frozen=True)
class Weights:
    """:class:`~robust_app.steps.Shares` and no more."""

    natural_weight: float | Tensor
    crown_share: float | Tensor
    box_regularizers: float | Tensor


class CompiledLosses(Losses):
    """:class:`~robust_app.steps.Losses` for one process and for batches of one shape.

    A loss is noted and compiled when it is first asked for, and again if parts of it come or go or
    BatchNorm is frozen.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._layers = Objective(self.network)
        self._compiled: dict[object, Callable[..., Any]] = {}

    def of(self, names: Sequence[str], batch: Batch, now: Shares) -> Iterator[Tensor]:
        """The losses of these names, 0-dim means over the batch; their gradients are known."""
        return (self._loss(name, batch, now) for name in names)

    def _weights(self, name: str, now: Shares) -> dict[str, float | Tensor]:
        """What a loss depends on; else 0, lest it be compiled again where nothing has changed."""
        certified = name in ("certified", "mixed")
        depends = {
            "natural_weight": name == "mixed",
            "crown_share": certified and self.method.crown,
            "box_regularizers": certified,
        }
        return {key: getattr(now, key) if needed else 0.0 for key, needed in depends.items()}

    def _loss(self, name: str, batch: Batch, now: Shares) -> Tensor:
        weights = self._weights(name, now)
        numbers = {key: value for key, value in weights.items() if not isinstance(value, Tensor)}
        changing = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
        parameters = dict(self._layers.named_parameters())
        state = parameters | dict(self._layers.named_buffers())
        box = (batch.box.center, batch.box.radius)
        points = (batch.x, batch.labels, *box, batch.center, batch.radius, batch.start)

        def evaluate(*tensors: Tensor) -> tuple[Any, ...]:
            values = iter(tensors)
            swapped = {key: next(values) for key in state}
            given = Weights(**(numbers | {key: next(values) for key in changing}))
            x, labels, box_center, box_radius, center, radius, start = values
            again = Batch(
                x, labels, Interval(box_center, box_radius), center, radius, batch.domain, start
            )
            make = self._by_name[name]
            loss = functional_call(self._layers, swapped, (lambda _: make(again, given),))
            x_adv = self.stationarity.x_adv if name == "adversarial" else None
            found = [] if x_adv is None else [x_adv]
            leaves = [swapped[key] for key in parameters] + found
            return loss, found, torch.autograd.grad(loss, leaves, allow_unused=True)

        tensors = (*state.values(), *changing.values(), *points)
        frozen = tuple(layer.statistics_frozen for layer in batch_norms(self.network))
        key = (name, frozen, *numbers.items())
        if key not in self._compiled:
            operations = make_fx(evaluate)(*tensors)
            self._compiled[key] = torch.compile(operations, fullgraph=True, dynamic=False)
            with torch.no_grad(), warnings.catch_warnings():
                # In this call it is compiled, and some torch versions advise TF32: what products
                # are in is a setting.
                warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
                self._compiled[key](*tensors)
        with torch.no_grad():
            loss, found, gradients = self._compiled[key](*tensors)
        leaves = [x_adv.detach().requires_grad_() for x_adv in found]
        for x_adv in leaves:
            self.stationarity.observe(batch.center, x_adv, batch.radius)
        known: Tensor = _Known.apply(loss, gradients, *parameters.values(), *leaves)
        return known


class _Known(torch.autograd.Function):
    """A loss whose gradients were taken along with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if part is None else slope * part for part in gradients)
