"""What an optimizer may be given, checked where it is given and not where it is first used."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mogd.priority import Priority
from mogd.rules import GramianRule, Rule
from mogd.wrapper import Wrapper


def decays(moment_decay: tuple[float, float]) -> tuple[float, float]:
    """β₁ and β₂ as a state holds them, or a ValueError."""
    pair = isinstance(moment_decay, Sequence) and len(moment_decay) == 2
    if not pair or not all(isinstance(beta, Real) and 0.0 <= beta < 1.0 for beta in moment_decay):
        raise ValueError(f"moment_decay must be two numbers in [0, 1), got {moment_decay!r}")
    first, second = map(float, moment_decay)
    return first, second


def make_base(params: Any, base: Callable[..., Optimizer], options: Mapping[str, Any]) -> Optimizer:
    """The optimizer to wrap, or a TypeError."""
    if is_layer(params):
        raise TypeError(
            "params must be parameters or groups of them, "
            f"got a {type(params).__name__}: give its parameters()"
        )
    if isinstance(params, Optimizer) or isinstance(base, Optimizer):
        found = type(params if isinstance(params, Optimizer) else base).__name__
        raise TypeError(
            "base must be an optimizer's class, its options beside it "
            f"(model.parameters(), torch.optim.Adam, lr=1e-3), got a made {found}"
        )
    if not callable(base):
        raise TypeError(
            "base must be an optimizer's class, its options beside it "
            f"(model.parameters(), torch.optim.Adam, lr=1e-3), got {base!r}"
        )
    try:
        made = base(params, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise TypeError(
            f"{error}: options other than moment_decay, rule, priority, nonfinite and weigh_by "
            "go to the base"
        ) from error
    if not isinstance(made, Optimizer) or isinstance(made, Wrapper):
        raise TypeError(
            "base must make a torch.optim.Optimizer that steps by itself, "
            f"got {type(made).__name__}"
        )
    return made


def as_rule(rule: Rule | Callable[[Tensor], Tensor]) -> Rule:
    """A rule, or a TypeError."""
    _check_callable("rule", rule, "Constant((1.0, 2.0))")
    if isinstance(rule, Rule):
        return rule
    if not _takes_one(rule):
        raise TypeError(
            "rule must take the Gramian alone; one that takes gramian, norms and prioritized "
            f"derives from mogd.Rule, got {rule!r}"
        )
    return GramianRule(rule)


def as_priority(priority: Priority) -> Priority:
    """A priority, or a TypeError."""
    _check_callable("priority", priority, "Fixed(1)")
    return priority


def is_layer(value: object) -> bool:
    """Whether it is a module that is given in the place of its parameters."""
    return isinstance(value, nn.Module) and not isinstance(value, nn.ParameterList)


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether it can be called with one argument, as far as its signature tells."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function that is not Python's
        return True
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True


def _check_callable(name: str, value: object, example: str) -> None:
    if isinstance(value, type):
        raise TypeError(f"{name} must be an instance, got the class {value.__name__}: call it")
    if not callable(value):
        raise TypeError(f"{name} must be callable, as mogd.{example} is, got {value!r}")
