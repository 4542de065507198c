"""A torch optimizer for several losses, whose weights depend on past gradients alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from mogd import parallel
from mogd.algorithm import Present, agreed, leave, take_in, weigh
from mogd.arguments import as_priority, as_rule, decays, make_base
from mogd.bisector_projection import BisectorProjection
from mogd.closure import MICRO_BATCHES, check_gradient, needs_closure, reevaluation
from mogd.gradients import LossGradients, known_number
from mogd.nonfinite import Guard
from mogd.past import Past
from mogd.pending import Pending
from mogd.priority import Fixed, Priority
from mogd.record import Record
from mogd.rules import Rule
from mogd.taken import Taken
from mogd.weigh_by import some_of
from mogd.wrapper import Wrapper


class UnbiasedMultiGradient(Wrapper):
    r"""Steps along a combination of several losses' gradients without biased weights.

    .. code-block:: text

        for each step t, losses L_k with gradients g_k:
            κ, κ_reg = rule(⟨m_j, m_k⟩, v, priority(L))     # moments of steps before t
            m_k ← β₁ m_k + (1 - β₁) g_k                     # bias-corrected when read
            v_k ← β₂ v_k + (1 - β₂) ‖g_k‖
            base optimizer steps along Σ_k (κ_k + 2 κ_reg,k L_k) g_k

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        base: optimizer class, or callable, that takes ``(params, **base_options)``.
        moment_decay: β₁ of the gradients' moments and β₂ of their norms', each in [0, 1).
        rule: maps the moments to weights; a :class:`~mogd.rules.Rule`, or any function from the
            Gramian, shape ``(K, K)``, to weights, shape ``(K,)``.
        priority: which loss goes first in conflict; see :mod:`mogd.priority`.
        nonfinite: what a loss or gradient that is not finite leads to: ``"raise"`` raises
            ``FloatingPointError``, ``"skip"`` leaves everything as it was and counts the step in
            :attr:`skipped`.
        weigh_by: parameters whose gradients the weights come from, the last layer that all losses
            share for instance; all if None. Each loss must reach one of them. The moments need
            memory for these only.
        **base_options: go to ``base``: ``lr``, ``betas``, ``weight_decay``, …

    Raises:
        TypeError: if ``params`` is a module, ``base`` does not make an optimizer, ``rule`` or
            ``priority`` cannot be called or is a class, or ``weigh_by`` is no iterable.
        ValueError: if a decay is outside [0, 1), ``nonfinite`` is unknown, or ``weigh_by`` is empty
            or names what is not among the parameters.

    Attributes:
        base: the optimizer that takes the steps; parameter groups and state are shared with it.
        last: the :class:`Record` of the last ``backward``, None before the first and after a state
            was loaded.
        distributed: whether the processes of an initialised ``torch.distributed`` train one model.

    Source: Fan & Li, "Adversarial Training and Provable Robustness: A Tale of Two Objectives",
    Algorithm 1.

    >>> point = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = UnbiasedMultiGradient([point], lr=0.1)
    >>> for _ in range(300):
    ...     record = optimizer.step(lambda: (point[0] ** 2 + point[1] ** 2, (point - 2).norm()))
    >>> record.conflict
    tensor(True)
    """

    last: Record | None

    def __init__(
        self,
        params: Any,
        base: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        moment_decay: tuple[float, float] = (0.9, 0.99),
        rule: Rule | Callable[[Tensor], Tensor] = BisectorProjection(),  # noqa: B008 (frozen)
        priority: Priority = Fixed(0),  # noqa: B008 (frozen)
        nonfinite: Literal["raise", "skip"] = "raise",
        weigh_by: Iterable[Tensor] | None = None,
        **base_options: Any,
    ) -> None:
        self.rule, self.priority = rule, priority
        super().__init__(make_base(params, base, base_options))
        self._past = Past(decays(moment_decay), some_of(self._parameters(), weigh_by))
        self.distributed = True
        self.last = None
        self._guard = Guard(nonfinite)
        self._accumulating = False
        self._pending = Pending()

    @property
    def rule(self) -> Rule:
        """From the moments to the weights; a plain function of the Gramian is made a rule."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule | Callable[[Tensor], Tensor]) -> None:
        self._rule = as_rule(rule)

    @property
    def priority(self) -> Priority:
        """Which loss goes first in conflict."""
        return self._priority

    @priority.setter
    def priority(self, priority: Priority) -> None:
        self._priority = as_priority(priority)

    @property
    def weigh_by(self) -> frozenset[Tensor] | None:
        """The parameters whose gradients the weights come from; None for all."""
        return self._past.weigh_by

    @property
    def moment_decay(self) -> tuple[float, float]:
        """β₁ of the gradients and β₂ of their norms."""
        return self._past.decay

    @property
    def nonfinite(self) -> str:
        """What a loss or gradient that is not finite leads to: ``"raise"`` or ``"skip"``."""
        return self._guard.policy

    @property
    def skipped(self) -> int:
        """How many ``backward`` calls were dropped because something was not finite."""
        return int(self._guard.skipped)

    @_disable_dynamo  # as torch.optim does: torch.compile would read .grad before its time
    def backward(
        self, losses: Iterable[Tensor], *, scaler: GradScaler | None = None
    ) -> Record | None:
        """Differentiate each loss and leave the weighted gradient in the parameters' ``.grad``.

        What ``.grad`` held before is replaced. A warning says so of a gradient that is newer than
        the last ``step`` or ``zero_grad``, or on the CPU was changed in place since, unless it is
        zero there (without a scaler, which may leave out steps). Leaves other than the parameters
        get their own ``.grad`` as usual.

        Args:
            losses: K scalar tensors. An iterator is consumed one loss at a time, each graph freed
                before the next loss is made; the losses of a sequence may share a graph.
            scaler: for mixed precision. It scales the losses given here *unscaled*; ``.grad`` is
                left scaled, as ``scaler.unscale_`` and ``scaler.step`` expect, while the moments
                see true gradients. An overflow leaves the moments alone and is for the scaler to
                handle, whatever ``nonfinite`` says.

        Returns:
            The record that is also kept as :attr:`last`; None inside :meth:`accumulate`.

        Raises:
            TypeError, ValueError: if ``losses`` are not K scalars with graphs that reach the
                parameters, those of ``weigh_by`` too, K as before and in each process; if
                ``scaler`` is none, or is not as in the micro-batch before; if the priority names no
                loss or the rule no K weights.
            FloatingPointError: if a loss, its gradient or the weighted sum is not finite and
                ``nonfinite`` is ``"raise"``; nothing has changed then.
            RuntimeError: if a loss's graph was freed before, or compiled for one backward pass, or
                processes that train one model hold different gradients or weights.
        """
        self = self._itself()
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        if scaler is None:  # which may have left out a step
            self._pending.taken.warn_of_others(self._parameters())
        collected = self._pending.take_gathered()
        shared = self.distributed and not self._accumulating
        try:
            number = known_number(losses)
            if shared and number is not None:
                parallel.agree_on_number(number)  # else backward passes would wait for each other
            collected.add(losses, self._parameters(), scaler)
            self._past.check_number(len(collected.losses))
            if shared and number is None:
                parallel.agree_on_number(len(collected.losses))
        except BaseException:
            self.zero_grad()
            raise
        if self._accumulating:
            self._pending.gathered = collected
            return None
        return self._apply(collected, scaler)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, ``backward`` only adds up the gradients of each loss.

        The first call outside combines the sums: micro-batches whose losses are divided by their
        number give the step of the whole batch. An error inside drops them.
        """
        self = self._itself()
        before, self._accumulating = self._accumulating, True
        try:
            yield
        except BaseException:
            self._pending.gathered = None
            raise
        finally:
            self._accumulating = before

    @_disable_dynamo
    def step(  # type: ignore[override]
        self, closure: Callable[[], Iterable[Tensor] | None] | None = None
    ) -> Record | None:
        """Let the base optimizer step along ``.grad``.

        Args:
            closure: returns the losses; with it, this is ``zero_grad``, ``backward`` and ``step``
                in one, after the closure: gradients that it leaves are dropped. A base that
                evaluates the losses several times a step (L-BFGS) needs it, and sees the same
                weights at each evaluation; ``nonfinite`` guards the first. From the second on, what
                the body of a generator leaves that the closure returns is added, not dropped.
                One that returns None, as those of trainer frameworks do, has called ``backward``
                itself: then this steps along ``.grad`` as it is.

        Returns:
            The record of ``backward`` if a closure returned the losses.

        Raises:
            RuntimeError: if accumulated gradients were never combined.
            TypeError: if ``closure`` cannot be called, the base needs the losses and gets none, or
                there is no gradient.
        """
        if closure is not None and not callable(closure):
            raise TypeError(
                "closure must be a function that returns the losses, got "
                f"{type(closure).__name__}: give losses to backward(), then call step()"
            )
        record = None if closure is None else self._backward_of(closure)
        self._pending.check_combined()
        if closure is not None and record is None and self._pending.keep is True:
            check_gradient(self._parameters())
        average = parallel.average if self.distributed else torch.clone
        objective = reevaluation(self.base, closure, record, average)
        self._base_step(self._pending.may_step(self._parameters()), objective)
        self._pending = Pending(self._parameters())
        return record

    @torch.enable_grad()
    def _backward_of(self, closure: Callable[[], Iterable[Tensor] | None]) -> Record | None:
        """Evaluate a step's closure and differentiate the losses, if it returns them."""
        before, self._pending.gathered = self._pending.gathered, None
        losses = closure()
        if losses is None:
            self._pending.gathered = self._pending.gathered or before
            return None
        if isinstance(losses, Record):
            self.zero_grad()
            raise TypeError(
                "closure must return the losses, or None after a backward(), "
                "got the Record of backward()"
            )
        # The closure may have gathered micro-batches, which zero_grad of the optimizer would drop.
        if self._pending.gathered is not None and needs_closure(type(self.base).step):
            self.zero_grad()
            raise TypeError(MICRO_BATCHES.format(base=type(self.base).__name__))
        self._pending.keep = True
        super().zero_grad()
        return self.backward(losses)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the parameters' ``.grad`` and drop what :meth:`accumulate` gathered."""
        self = self._itself()
        super().zero_grad(set_to_none)
        self._pending = Pending(self._parameters())

    def __repr__(self) -> str:
        names = ("rule", "priority", "moment_decay", "nonfinite")
        own = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({own}, base={self.base!r})"

    def _added_state(self) -> dict[str, Any]:
        return self._past.state_dict(self._parameters()) | {"skipped": self.skipped}

    def _from_added_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        past = self._past.loaded(state_dict, self._parameters(), self._device())
        guard = Guard(self._guard.policy)
        guard.skipped = torch.tensor(int(state_dict["skipped"]), device="cpu")
        # What gradients there are was of the state before.
        pending = Pending(self._parameters())
        return {"last": None, "_past": past, "_guard": guard, "_pending": pending}

    def __getstate__(self) -> dict[str, Any]:
        own = ("_rule", "_priority", "_past", "_guard", "_pending")
        state = {name: vars(self)[name] for name in ("base", "distributed", "last", *own)}
        # A copy that is made inside accumulate() is not inside of it itself.
        return state | {"_accumulating": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pending.taken = Taken(self._parameters())  # a copy's are the original's to lose

    def _apply(self, collected: LossGradients, scaler: GradScaler | None) -> Record:
        """Weigh by the past, take in the present, combine (Algorithm 1)."""
        self._past.check_reached(collected.gradients)
        device = self._device()
        present = Present.of(collected, scaler, device)
        if self.distributed and parallel.world_size() > 1:
            look = self.nonfinite == "raise" or not present.losses.is_cuda
            present = agreed(present, self.last, look)
        moments = self._past.of(len(present.losses), device)
        self.last, keep = weigh(present, moments, self.rule, self.priority, self._guard)
        mask = keep if isinstance(keep, Tensor) else None
        if keep is not False:
            moments.keep_only(self._parameters())
            take_in(present, moments, self._past.weigh_by, mask)
            self._past.moments = moments
        if scaler is not None:  # it looks for what overflowed
            leave(present, self.last.factors, None)
        elif keep is not False:
            leave(present, self.last.factors, mask)
        self._pending.keep = keep if scaler is None else True
        return self.last
