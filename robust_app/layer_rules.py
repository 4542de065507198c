"""Rules for layers by their type: what boxes and linear bounds have in common."""

import inspect
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


_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
"""By which a module's forward is called."""

_SPECIAL = {*_CALLS, "__getattr__", "__getattribute__", "__iter__", "__len__", "__getitem__"}
"""Members with special names that an evaluation of a layer may read."""

_IDLE = {
    *("extra_repr", "reset_parameters", "reset_running_stats", "_load_from_state_dict"),
    *("_check_input_dim", "append", "extend", "insert", "pop"),
}
"""Members that none reads, or that can only refuse."""

_NUMBERS = {"weight", "bias", "running_mean", "running_var"}
"""What layers read beside what their classes list."""


def is_plainly(layer: nn.Module, kind: type[_Layer]) -> TypeGuard[_Layer]:
    """Whether ``layer`` computes what ``kind`` does: nobody gave it another forward or __call__.

    Nor, to a convolution, what its forward calls: a weight that is standardised in there is not the
    layer's ``weight``, of which bounds are made.
    """
    return (
        isinstance(layer, kind)
        and type(layer).forward is kind.forward
        and all(getattr(type(layer), name) is getattr(nn.Module, name) for name in _CALLS)
        and vars(layer).keys().isdisjoint(("forward", *_CALLS))
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


def rule_owner(function: Any, layer: nn.Module) -> type:
    """The class that the rule is registered for which a dispatch takes; ``object`` without."""
    return next(kind for kind in type(layer).__mro__ if kind in function.registry)


def overridden(layer: nn.Module, kind: type) -> set[str]:
    """By which members a layer may compute something else than its base class ``kind`` does.

    Of the methods that ``kind`` has, its class or the layer itself has others; or its class has
    properties for numbers that ``kind`` reads. Of a class that overrides ``forward``, see
    :func:`by_rule`.
    """
    mine = type(layer).__mro__[: type(layer).__mro__.index(kind)]
    others = [base for base in mine if base is not small_patches.Conv2d]
    members = {name: value for base in others for name, value in vars(base).items()}
    methods = {
        name
        for base in _bases(kind)
        for name, value in vars(base).items()
        if callable(value) and not name.startswith("__")
    }
    properties = {name for name, value in members.items() if inspect.isdatadescriptor(value)}
    own = members.keys() - {"forward"} | vars(layer).keys()
    return own & (methods - _IDLE | _SPECIAL) | properties & numbers_of(kind)


def numbers_of(kind: type) -> set[str]:
    """What layers of a class read, as far as it is listed."""
    constants = (vars(base).get("__constants__", ()) for base in _bases(kind))
    annotated = (inspect.get_annotations(base) for base in _bases(kind))
    return _NUMBERS.union(*constants, *annotated)


def _bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base not in (nn.Module, object)]


def by_rule(function: Any, layer: nn.Module, *rest: Any) -> Any:
    """``function(layer, *rest)`` by a rule that was registered for the layer's own forward.

    Dispatch finds the rules of base classes too, which say nothing about another forward.

    Args:
        function: a ``functools.singledispatch``.
        layer: its first argument.
        rest: the others.

    Raises:
        UnsupportedLayer: the rule is of a base class whose forward the layer's class overrides.
    """
    kind: Any = rule_owner(function, layer)
    forward = getattr(kind, "forward", None)  # a rule for a class without is for any
    if forward is not None and type(layer).forward is not forward:
        raise Rules(function, "rule of its own").overriding(layer, kind)
    return function(layer, *rest)


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

    def overriding(self, layer: nn.Module, kind: type) -> UnsupportedLayer:
        """The error for a layer with another forward than the class that has a rule."""
        return self.unsupported(layer, f"it overrides {kind.__name__}.forward; {self._remedy}")

    @property
    def _remedy(self) -> str:
        where = f"{self.function.__module__}.{self.function.__name__}"
        return f"register a rule for it with @{where}.register"

    def _apply(
        self, rule: Callable[..., Any], kind: type[nn.Module], layer: nn.Module, *rest: Any
    ) -> Any:
        if type(layer).forward is not kind.forward:  # see by_rule
            raise self.overriding(layer, kind)
        if not is_plainly(layer, kind):
            raise self.unsupported(
                layer,
                f"it was given a forward or __call__ of its own, or a _conv_forward, and may "
                f"compute anything; make it a class with a forward, and {self._remedy}",
            )
        return rule(layer, *rest)
