"""What is refused, and that a refusal changes nothing."""

import copy
import inspect
import math
import pickle
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from chosen import (
    AGREEING,
    CONFLICTING,
    assert_same_bits,
    doubles,
    linear,
    optimizer_after,
    parameter,
    snapshot,
    weights_next,
)
from torch.testing import assert_close

from mogd import BisectorProjection, Fixed, UnbiasedMultiGradient
from mogd.rules import Rule


def test_the_number_of_losses_may_not_change():
    p, optimizer = optimizer_after(AGREEING)
    before = snapshot(optimizer)
    for losses in (1, 3):
        message = f"losses must be 2 as before, .* got {losses}: .* a new optimizer"
        with pytest.raises(ValueError, match=message):
            optimizer.backward([linear(p, (1, 0))] * losses)
        assert p.grad is None
        assert_same_bits(snapshot(optimizer), before)
    assert_close(weights_next(optimizer), doubles(2 / 3, 2 / 5))


def test_a_first_step_that_fails_does_not_fix_the_number_of_losses():
    p, optimizer = optimizer_after()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="weighs 2 losses or more, got 1"):
        optimizer.backward([linear(p, (1, 0))])
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.last is None
    assert weights_next(optimizer).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("answer", "error"),
    [(2, ValueError), (-1, ValueError), (0.0, TypeError), (None, TypeError)],
)
def test_a_priority_that_names_no_loss_is_refused_and_changes_nothing(answer, error):
    p, optimizer = optimizer_after(CONFLICTING, priority=lambda _: 0)
    before, last = snapshot(optimizer), optimizer.last
    optimizer.priority = lambda _: answer
    with pytest.raises(error, match="priority must return"):
        weights_next(optimizer)
    assert p.grad is None
    assert optimizer.last is last
    assert_same_bits(snapshot(optimizer), before)


def test_a_closure_without_losses_or_gradients_is_refused():
    _, optimizer = optimizer_after(CONFLICTING, lr=0.1)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="closure must return the losses"):
        optimizer.step(lambda: None)
    assert_same_bits(snapshot(optimizer), before)


class OracleError(Exception):
    pass


def fail(*_):
    raise OracleError


def failing_objectives(p):
    yield linear(p, (5, 5))
    raise OracleError


@pytest.mark.parametrize("fault", ["objective", "priority", "rule"])
@pytest.mark.parametrize("history", [[], [CONFLICTING]])
def test_an_exception_on_the_way_leaves_a_clean_optimizer(fault, history):
    p, optimizer = optimizer_after(*history, lr=0.1, momentum=0.9)
    _, undisturbed = optimizer_after(*history, lr=0.1, momentum=0.9)
    before, last = snapshot(optimizer), optimizer.last
    rule, priority = optimizer.rule, optimizer.priority
    if fault == "rule":
        optimizer.rule = fail
    if fault == "priority":
        optimizer.priority = fail
    losses = [linear(p, g) for g in AGREEING]
    with pytest.raises(OracleError):
        optimizer.backward(failing_objectives(p) if fault == "objective" else losses)
    assert p.grad is None
    assert optimizer.last is last
    assert_same_bits(snapshot(optimizer), before)
    optimizer.rule, optimizer.priority = rule, priority
    for each in (optimizer, undisturbed):
        q = each.param_groups[0]["params"][0]
        each.step(lambda q=q: [linear(q, g) for g in AGREEING])
    assert_same_bits(snapshot(optimizer), snapshot(undisturbed))


def test_sparse_gradients_are_refused_by_name_and_change_nothing():
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = UnbiasedMultiGradient(table.parameters(), lr=0.1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(5, 2\) .*sparse=False"):
        optimizer.step(lambda: [table(torch.tensor([k])).sum() for k in range(2)])
    assert table.weight.grad is None
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda p: [], ValueError, "losses must hold at least one"),
        (lambda p: [p], ValueError, r"losses\[0\] must be a scalar, got shape \(2,\)"),
        (lambda p: [p.sum(), p.detach().sum()], ValueError, r"losses\[1\] has no graph"),
        (lambda p: p.sum(), TypeError, "losses must be an iterable of scalar tensors, got one"),
        (lambda p: {"a": p.sum()}, TypeError, r"got a dict: give its values\(\)"),
        (lambda p: [p.sum(), torch.zeros(())], ValueError, "switch a loss off, multiply it by 0"),
        (lambda p: [p.sum(), 1.0], TypeError, r"losses\[1\] must be a scalar tensor, got float"),
        (lambda p: [p.sum() * 1j], TypeError, r"losses\[0\] must be real, got torch.complex128"),
    ],
)
def test_losses_of_the_wrong_kind_are_refused_and_change_nothing(losses, error, message):
    p, optimizer = optimizer_after(CONFLICTING)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.backward(losses(p))
    assert p.grad is None
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"moment_decay": (1.0, 0.9)}, ValueError, r"moment_decay must be .* got \(1\.0, 0\.9\)"),
        ({"moment_decay": (0.9, -0.1)}, ValueError, r"moment_decay must be .* got \(0\.9, -0\.1\)"),
        ({"moment_decay": (0.9, math.nan)}, ValueError, "moment_decay must be .* got"),
        ({"moment_decay": (0.9,)}, ValueError, r"moment_decay must be .* got \(0\.9,\)"),
        ({"moment_decay": 0.9}, ValueError, r"moment_decay must be .* got 0\.9"),
        ({"moment_decay": (0.9, None)}, ValueError, r"moment_decay must be .* got \(0\.9, None\)"),
        ({"moment_decay": "ab"}, ValueError, "moment_decay must be .* got 'ab'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be 'raise' or 'skip', got 'ignore'"),
        ({"nonfinite": True}, ValueError, "nonfinite must be 'raise' or 'skip', got True"),
        ({"base": "SGD"}, TypeError, r"base must be .* \(model.parameters\(\), .* got 'SGD'"),
        ({"base": 1e-3}, TypeError, r"torch\.optim\.Adam, lr=1e-3\), got 0\.001"),
        ({"prioritiy": Fixed(1)}, TypeError, r"'prioritiy': options other than .* go to the base"),
        ({"base": lambda params: 3}, TypeError, r"base must make a .*Optimizer .*, got int"),
        ({"base": UnbiasedMultiGradient}, TypeError, "base must .* got UnbiasedMultiGradient"),
        ({"rule": "bisector"}, TypeError, r"callable, as mogd\.Constant\(.*got 'bisector'"),
        ({"rule": BisectorProjection}, TypeError, "rule .* the class BisectorProjection: call it"),
        ({"rule": lambda g, v, i: v}, TypeError, r"rule must take the Gramian alone; .*mogd\.Rule"),
        ({"rule": lambda: 1}, TypeError, "rule must take the Gramian alone"),
        ({"priority": 1}, TypeError, r"callable, as mogd\.Fixed\(1\) is, got 1"),
        ({"priority": Fixed}, TypeError, "priority must be an instance, got the class Fixed"),
        ({"weigh_by": torch.nn.Linear(1, 1)}, TypeError, "weigh_by must be .* got Linear"),
        ({"weigh_by": torch.nn.Sequential()}, TypeError, "layer.parameters.* got Sequential"),
        ({"weigh_by": torch.zeros(2)}, TypeError, "weigh_by must be .* got Tensor"),
        ({"weigh_by": [[parameter(0.0)]]}, ValueError, "weigh_by must hold .* got 1 others"),
    ],
)
def test_wrong_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        UnbiasedMultiGradient([parameter(0.0)], **options)


def test_what_holds_parameters_may_be_weighed_by():
    held = torch.nn.ParameterList([parameter(0.0), parameter(1.0)])
    optimizer = UnbiasedMultiGradient(held, weigh_by=held)
    assert optimizer.weigh_by == set(held)


def test_a_rule_that_does_not_tell_its_signature_is_taken():
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(torch.diagonal)
    _, optimizer = optimizer_after(AGREEING, rule=torch.diagonal)
    assert_close(weights_next(optimizer), optimizer.last.gramian.diagonal())


@pytest.mark.parametrize("decay", [(0.0, 0.0), (0, 0), [0.5, 0.999999]])
def test_any_decay_from_0_to_below_1_is_accepted(decay):
    _, optimizer = optimizer_after(AGREEING, moment_decay=decay)
    assert_close(weights_next(optimizer), doubles(2 / 3, 2 / 5))


@pytest.mark.parametrize("wrap", [lambda p, adam: (adam,), lambda p, adam: ([p], adam)])
def test_an_optimizer_in_the_place_of_its_class_is_refused(wrap):
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"base must be an optimizer's class.* got a made Adam"):
        UnbiasedMultiGradient(*wrap(p, torch.optim.Adam([p])))


@pytest.mark.parametrize(("name", "value"), [("rule", "x"), ("priority", 1), ("priority", Fixed)])
def test_wrong_options_are_refused_where_they_are_set_later(name, value):
    _, optimizer = optimizer_after(CONFLICTING)
    before = getattr(optimizer, name)
    with pytest.raises(TypeError, match=f"{name} must be"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is before


def test_a_function_of_the_gramian_may_be_set_later():
    _, optimizer = optimizer_after(CONFLICTING)
    optimizer.rule = lambda gramian: torch.tensor([3.0, 4.0])
    assert weights_next(optimizer).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("scaler", [2.0, "grad"])
def test_what_is_no_scaler_is_refused_and_changes_nothing(scaler):
    p, optimizer = optimizer_after(CONFLICTING)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler, got"):
        optimizer.backward([p.sum(), -p.sum()], scaler=scaler)
    assert_same_bits(snapshot(optimizer), before)


def test_losses_in_the_place_of_a_closure_are_refused_with_the_way_to_give_them():
    p, optimizer = optimizer_after(CONFLICTING)
    with pytest.raises(TypeError, match=r"closure must be a function .* got list: .* backward\(\)"):
        optimizer.step([p.sum(), -p.sum()])


@pytest.mark.parametrize("state", [None, "x", 3])
def test_a_state_that_is_no_mapping_is_refused(state):
    _, optimizer = optimizer_after(CONFLICTING)
    with pytest.raises(TypeError, match="state_dict must be a mapping, got"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("place", [0, 1])
def test_a_graph_that_the_caller_has_freed_is_told_as_that(place):
    p, optimizer = optimizer_after(CONFLICTING)
    losses = [(p**2).sum(), (p**3).sum()]
    torch.autograd.grad(losses[place], p)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"losses\[{place}\] has a graph .* make the losses"):
        optimizer.backward(losses)
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("kind", [list, iter])
def test_losses_with_a_graph_are_differentiated_under_no_grad_too(kind):
    p, optimizer = optimizer_after(CONFLICTING)
    q, other = optimizer_after(CONFLICTING)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer.backward([(p**2).sum(), (p**3).sum()], scaler=scaler)
    losses = [(q**2).sum(), (q**3).sum().reshape(1)]
    with torch.no_grad():
        other.backward(kind(losses), scaler=scaler)
    assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("decays", [(1.5, 0.9), (0.9, "a"), 0.9])
def test_a_state_with_decays_that_are_none_is_refused_and_changes_nothing(decays):
    _, optimizer = optimizer_after(CONFLICTING)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="moment_decay must be two numbers"):
        optimizer.load_state_dict(optimizer.state_dict() | {"moment_decay": decays})
    assert_same_bits(snapshot(optimizer), before)


def test_decays_of_another_library_s_numbers_are_saved_as_data(tmp_path):
    _, optimizer = optimizer_after(CONFLICTING, moment_decay=(np.float32(0.5), Fraction(3, 4)))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["moment_decay"] == [0.5, 0.75]


class Answering(Rule):
    """A rule that gives one answer, whatever it is asked."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, gramian, norms, prioritized):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.ones(2), TypeError, "rule must return a Weighting, got Tensor from .*Answering"),
        (None, TypeError, "rule must return a Weighting, got NoneType"),
        ((torch.ones(2),) * 3, TypeError, "rule must return a Weighting, got tuple"),
        (([1, 1], [0, 0]), TypeError, "rule must return weights as a real tensor, got list"),
        (
            (torch.ones(2), 0),
            TypeError,
            "rule must return regularization as a real tensor, got int",
        ),
        ((torch.ones(2) * 1j, torch.ones(2)), TypeError, "real tensor, got torch.complex64"),
        ((torch.ones(1), torch.zeros(2)), ValueError, r"weights of shape \(2,\), got \(1,\)"),
        ((torch.ones(2), torch.zeros(())), ValueError, r"regularization of shape .* got \(\)"),
    ],
)
def test_a_rule_that_answers_no_weights_for_the_losses_is_refused(answer, error, message):
    p, optimizer = optimizer_after(AGREEING)
    before = snapshot(optimizer)
    optimizer.rule = Answering(answer)
    with pytest.raises(error, match=message):
        optimizer.backward([linear(p, gradient) for gradient in AGREEING])
    assert_same_bits(snapshot(optimizer), before)


def test_the_decays_of_the_moments_are_for_good():
    _, optimizer = optimizer_after()
    with pytest.raises(AttributeError, match="moment_decay"):
        optimizer.moment_decay = (0.5, 0.5)


def in_agreement(p):
    return [linear(p, gradient) for gradient in AGREEING]


def test_a_gradient_that_no_step_was_taken_along_is_not_replaced_without_a_word():
    p, optimizer = optimizer_after()
    optimizer.backward(in_agreement(p))
    with pytest.warns(UserWarning, match=r"backward\(\) replaces what \.grad holds") as caught:
        optimizer.backward(in_agreement(p))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="gather micro-batches"), optimizer.accumulate():
        optimizer.backward(in_agreement(p))


def clear_by_hand(p, _):
    p.grad = None


def write_zeros(p, _):
    """As a module's ``zero_grad(set_to_none=False)``."""
    if p.grad is not None:
        p.grad.zero_()


PENALTIES = {
    "before the first": lambda p, optimizer: None,
    "after zero_grad": lambda p, optimizer: optimizer.zero_grad(),
    "after the module's zero_grad": clear_by_hand,
    "after a step, in place": lambda p, optimizer: None,
    "after zeros, in place": lambda p, optimizer: optimizer.zero_grad(set_to_none=False),
    "after the module's zeros, in place": write_zeros,
    "between micro-batches": lambda p, optimizer: optimizer.backward(in_agreement(p)),
}


@pytest.mark.parametrize("when", PENALTIES)
def test_a_penalty_s_own_backward_is_not_lost_without_a_word(when):
    p, optimizer = optimizer_after()
    if when != "before the first":
        optimizer.backward(in_agreement(p))
        optimizer.step()
    with optimizer.accumulate():
        PENALTIES[when](p, optimizer)
    linear(p, (1, 1)).backward()
    with pytest.warns(UserWarning, match="add penalties to the losses"):
        optimizer.backward(in_agreement(p))


SETTLED = {
    "stepped along": lambda p, optimizer: optimizer.step(),
    "cleared": lambda p, optimizer: optimizer.zero_grad(),
    "set to zero": lambda p, optimizer: optimizer.zero_grad(set_to_none=False),
    "stepped along, then set to zero": lambda p, optimizer: (optimizer.step(), p.grad.zero_()),
    "set to zero by another": write_zeros,
    "cleared by hand": clear_by_hand,
    "taken back": lambda p, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


@pytest.mark.parametrize("how", SETTLED)
def test_a_gradient_that_nothing_is_lost_of_is_replaced_silently(how):
    p, optimizer = optimizer_after(AGREEING)  # warnings are errors here
    optimizer.backward(in_agreement(p))
    SETTLED[how](p, optimizer)
    optimizer.backward(in_agreement(p))
    optimizer.step()
    with optimizer.accumulate():
        optimizer.backward(in_agreement(p))
        optimizer.backward(in_agreement(p))
    optimizer.backward(in_agreement(p))


def test_what_is_written_to_a_part_of_shared_memory_is_not_taken_for_another():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = UnbiasedMultiGradient([p, q], lr=0.1)
    p.grad, q.grad = torch.ones(4).split(2)
    optimizer.step()
    p.grad.zero_()
    optimizer.backward([linear(p, (1, 2)) + linear(q, (1, 0)), linear(p, (2, 1))])


def test_a_gradient_of_inference_mode_may_be_stepped_along():
    p, optimizer = optimizer_after(AGREEING)
    with torch.inference_mode():
        p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer.step()
    assert_close(p.detach(), before - optimizer.param_groups[0]["lr"])
    optimizer.backward(in_agreement(p))


@pytest.mark.parametrize("layer", [torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.ReLU())])
def test_a_model_in_the_place_of_its_parameters_is_refused(layer):
    match = f"params must be .* got a {type(layer).__name__}: give its parameters"
    with pytest.raises(TypeError, match=match):
        UnbiasedMultiGradient(layer, torch.optim.Adam, lr=0.1)
    UnbiasedMultiGradient(torch.nn.ParameterList([torch.zeros(1)]), lr=0.1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_watches_over_its_own_gradients(copied):
    _, optimizer = optimizer_after(AGREEING)
    twin = copied(optimizer)
    p = twin.param_groups[0]["params"][0]
    twin.backward(in_agreement(p))
    twin.step()
    twin.backward(in_agreement(p))
    with pytest.warns(UserWarning, match="replaces what"):
        twin.backward(in_agreement(p))


def test_a_gradient_that_was_stepped_along_is_not_kept_alive():
    p, optimizer = optimizer_after()
    optimizer.backward(in_agreement(p))
    optimizer.step()
    gradient = weakref.ref(p.grad)
    p.grad = None
    assert gradient() is None


def test_another_optimizer_s_backward_before_one_s_own_is_told():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    first, second = (UnbiasedMultiGradient(part.parameters(), lr=0.1) for part in model)
    losses = lambda: model(torch.ones(2)).unbind()  # noqa: E731
    for optimizer in (first, second):
        optimizer.zero_grad()
    first.backward(losses())
    with pytest.warns(UserWarning, match="replaces what"):
        second.backward(losses())


def test_losses_without_an_order_are_refused_and_change_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = UnbiasedMultiGradient([p], lr=0.1)
    with pytest.raises(TypeError, match="losses must have an order, got a set: give a list"):
        optimizer.backward({p[0] * 1, p[1] * 1})
    assert optimizer.last is None
    assert p.grad is None


def test_the_record_of_a_backward_is_no_answer_of_a_closure():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = UnbiasedMultiGradient([p], lr=0.1)
    with pytest.raises(TypeError, match=r"closure must return the losses, or None .* got the Rec"):
        optimizer.step(lambda: optimizer.backward([p[0] * 1, p[1] * 1]))
    assert p.grad is None
    optimizer.step()
    assert torch.equal(p, torch.ones(2))
