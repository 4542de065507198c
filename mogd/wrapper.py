"""An optimizer around another: what is asked of any optimizer, by way of the base."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer


def _of_base(name: str) -> Any:
    """An attribute that is the base's, whoever replaces it there or here."""
    return property(
        lambda wrapper: getattr(wrapper.base, name),
        lambda wrapper, value: setattr(wrapper.base, name, value),
    )


class Wrapper(Optimizer):
    """Shares parameter groups, options and state with its base, and adds state of its own.

    Attributes:
        base: the optimizer that takes the steps.
    """

    base: Optimizer
    # Schedulers, clipping and scalers must see the groups and state the base works with.
    param_groups = _of_base("param_groups")
    state = _of_base("state")
    defaults = _of_base("defaults")

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        options = set(base.defaults)
        # Hooks, as of an optimizer that was copied: __init__ would make groups and state, too.
        super().__setstate__({})
        for added in base.defaults.keys() - options:  # by torch; the base may not know it
            del base.defaults[added]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its past gradients count as zero."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state and what this optimizer adds to it; no code, only data."""
        for prepare in self._optimizer_state_dict_pre_hooks.values():
            prepare(self)
        state_dict = self.base.state_dict() | self._added_state()
        for revise in self._optimizer_state_dict_post_hooks.values():
            state_dict = revise(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, to the same bits.

        Raises:
            TypeError: if ``state_dict`` is no mapping.
            ValueError: if the state is another optimizer's or does not fit the parameters, or is
                of another base, where that shows: by an option that it lacks, or because the base
                refuses it. Nothing has changed then.
        """
        self = self._itself()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for revise in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = revise(self, state_dict) or state_dict
        missing = {"state", "param_groups", *self._added_state()} - set(state_dict)
        if missing:
            raise ValueError(
                f"state_dict lacks {sorted(missing)}: it is not of {type(self).__name__} "
                "(a base optimizer's own state loads through optimizer.base.load_state_dict)"
            )
        before = self.state, self.param_groups
        options = [set(self.defaults) & set(group) for group in self.param_groups]
        try:
            attributes = self._from_added_state(state_dict)
            self.base.load_state_dict(state_dict)
            self._check_options(options)
        except Exception as error:
            if self.state is not before[0]:
                self.state = before[0]
            if self.param_groups is not before[1]:
                self.param_groups = before[1]
            if not isinstance(error, LookupError | TypeError | AttributeError):
                raise
            base = type(self.base).__name__
            fault = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"state_dict is damaged, or not of {base}: {fault}") from error
        vars(self).update(attributes)
        for conclude in self._optimizer_load_state_dict_post_hooks.values():
            conclude(self)

    def _check_options(self, options: list[set[str]]) -> None:
        """Check that the groups which were loaded have the options of those before."""
        groups = zip(options, self.param_groups, strict=True)
        lacking = set().union(*(names - set(group) for names, group in groups))
        lacking.discard("differentiable")  # which torch adds to the defaults of any base
        if lacking:
            raise ValueError(
                f"state_dict is of another base, or an older one: its param_groups lack options "
                f"of {type(self.base).__name__}, {sorted(lacking)} (add them if it is an older one)"
            )

    def _added_state(self) -> dict[str, Any]:
        """The entries of :meth:`state_dict` beside the base's."""
        raise NotImplementedError

    def _from_added_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The attributes to set for these entries, by name; a ValueError if they do not fit."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        super().__setstate__({})

    def _itself(self) -> Self:
        """The optimizer that holds the state.

        Lightning wraps an optimizer in an object that imitates its class: methods of ours run on
        that object, which reads what it lacks from the optimizer, but keeps what they set.
        """
        imitation: Any = self
        itself: Self = self if "base" in vars(self) else imitation.optimizer
        return itself

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _device(self) -> torch.device:
        return self._parameters()[0].device

    @torch.no_grad()
    def _base_step(self, keep: Tensor | bool, closure: Callable[[], float] | None = None) -> None:
        """Step where ``keep`` is True; a base that can decide on the device does so.

        It does by the protocol between GradScaler and fused optimizers.
        """
        if isinstance(keep, Tensor) and getattr(self.base, "_step_supports_amp_scaling", False):
            fused: Any = self.base
            fused.grad_scale, fused.found_inf = None, (~keep).float()
            fused.step()
            del fused.grad_scale, fused.found_inf
        elif keep:
            self.base.step() if closure is None else self.base.step(closure)
