"""Rules for layers by their type: what boxes and linear bounds have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard, TypeVar

from torch import nn

from robust_app import small_patches
from robust_app.errors import UserError

IN_TRAINING = "it is in training mode; call .eval() on it first"

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
"""The identity, in evaluation."""

_Layer = TypeVar("_Layer", bound=nn.Module)
_Rule = TypeVar("_Rule", bound=Callable[..., Any])


class UnsupportedLayer(UserError, TypeError):
    """A layer, or a mode of it, for which there is no sound rule."""


def is_plainly(layer: nn.Module, kind: type[_Layer]) -> TypeGuard[_Layer]:
    """Whether ``layer`` computes what ``kind`` does: nobody gave it another forward or __call__.

    Nor, to a convolution, what its forward calls: a weight that is standardised in there is not the
    layer's ``weight``, of which bounds are made.
    """
    return (
        isinstance(layer, kind)
        and type(layer).forward is kind.forward
        and type(layer).__call__ is nn.Module.__call__
        and "forward" not in vars(layer)
        and (not isinstance(layer, nn.Conv2d) or _convolves_plainly(layer))
    )


def _convolves_plainly(layer: nn.Conv2d) -> bool:
    known = (nn.Conv2d._conv_forward, small_patches.Conv2d._conv_forward)
    return type(layer)._conv_forward in known and "_conv_forward" not in vars(layer)


def flattened(network: nn.Module) -> list[nn.Module]:
    """The layers of nested Sequentials as one list; any other module is one layer."""
    if not is_plainly(network, nn.Sequential):
        return [network]
    return [layer for child in network for layer in flattened(child)]


@dataclass(frozen=True)
class Rules:
    """The rules behind a function that dispatches on the type of its first argument.

    Attributes:
        function: a ``functools.singledispatch``.
        give: what they give, for errors.
    """

    function: Any
    give: str

    def of(self, *kinds: type[nn.Module]) -> Callable[[_Rule], _Rule]:
        """Register a rule for layers that are plainly of one of these kinds."""

        def register(rule: _Rule) -> _Rule:
            for kind in kinds:
                self.function.register(kind, partial(self._apply, rule, kind))
            return rule

        return register

    def unsupported(self, layer: nn.Module, why: str = "") -> UnsupportedLayer:
        """The error for a layer; without a reason, what can be done about it."""
        name, remedy = type(layer).__name__, self._remedy
        if next(layer.children(), None) is not None:
            remedy = (
                f"if it calls layers in turn, make it an nn.Sequential of them; else export it to "
                f"ONNX for robust-app evaluate FILE.onnx, or {remedy}"
            )
        return UnsupportedLayer(f"no {self.give} for the layer {name}: {why or remedy}")

    @property
    def _remedy(self) -> str:
        where = f"{self.function.__module__}.{self.function.__name__}"
        return f"register a rule for it with @{where}.register"

    def _apply(
        self, rule: Callable[..., Any], kind: type[nn.Module], layer: nn.Module, *rest: Any
    ) -> Any:
        # Dispatch finds the rules of base classes too, which say nothing about another forward.
        if type(layer).forward is not kind.forward:
            raise self.unsupported(layer, f"it overrides {kind.__name__}.forward; {self._remedy}")
        if not is_plainly(layer, kind):
            raise self.unsupported(
                layer,
                f"it was given a forward or __call__ of its own, or a _conv_forward, and may "
                f"compute anything; make it a class with a forward, and {self._remedy}",
            )
        return rule(layer, *rest)
