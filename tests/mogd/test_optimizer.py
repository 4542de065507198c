import copy
import math

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mogd import BisectorProjection, Constant, Fixed, Rule, Threshold, UnbiasedMultiGradient


def test_it_is_a_torch_optimizer():
    p, optimizer = optimizer_after(lr=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.base, torch.optim.SGD)
    assert optimizer.param_groups[0]["params"] == [p]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.last is None
    assert optimizer.skipped == 0


def test_the_first_step_weighs_evenly():
    p, optimizer = optimizer_after()
    record = optimizer.backward([linear(p, (3, 0)), linear(p, (-4, 3))])
    assert record.weights.tolist() == [0.5, 0.5]
    assert p.grad.tolist() == [-0.5, 1.5]
    p, optimizer = optimizer_after(rule=lambda gramian: gramian.diagonal())
    assert_close(weights_next(optimizer, (1, 0), (0, 1), (1, 1)), doubles(1 / 3, 1 / 3, 1 / 3))


@pytest.mark.parametrize(
    ("history", "favoured", "expected"),
    [
        (AGREEING, 0, (2 / 3, 2 / 5)),
        (AGREEING, 1, (2 / 3, 2 / 5)),
        (CONFLICTING, 0, (1, 12 / 25)),
        (CONFLICTING, 1, (4 / 3, 1)),
    ],
)
def test_the_second_step_has_the_weights_computed_by_hand(history, favoured, expected):
    _, optimizer = optimizer_after(history, priority=Fixed(favoured))
    assert_close(weights_next(optimizer), doubles(*expected))


def test_the_moment_decays_go_where_they_belong():
    # m = (1·(3, 0) + 2·(0, 4)) / 3 with β₁ = ½; v = (3·3 + 4·4) / 7 with β₂ = ¾
    p, optimizer = optimizer_after(
        ((3, 0),), ((0, 4),), moment_decay=(0.5, 0.75), rule=Constant([1])
    )
    record = optimizer.backward([linear(p, (1, 1))])
    assert_close(record.gramian, doubles([1 + 64 / 9]))
    assert_close(record.norms, doubles(25 / 7))


def test_grad_holds_the_weighted_sum():
    p, optimizer = optimizer_after(AGREEING)
    optimizer.backward([linear(p, (1, 1)), linear(p, (2, 0))])
    assert_close(p.grad, doubles(2 / 3 + 4 / 5, 2 / 3))


@pytest.mark.parametrize("value", [5.0, -2.0, 0.0])
def test_grad_holds_the_gradient_of_the_regularisation(value):
    p, optimizer = optimizer_after(CONFLICTING, priority=Fixed(1))
    record = optimizer.backward([linear(p, (1, 1), value=7.0), linear(p, (2, 0), value)])
    assert record.regularization.tolist() == [0, 0.5]
    # 4/3 g₁ + (1 + 2 κ_reg L₂) g₂
    assert_close(p.grad, doubles(4 / 3 + (1 + value) * 2, 4 / 3))


def test_the_step_is_the_bases_along_grad():
    p, optimizer = optimizer_after(AGREEING, lr=0.1, p=parameter(1.0, 1.0), weight_decay=0.5)
    before = p.detach().clone()
    optimizer.backward([linear(p, (1, 1)), linear(p, (2, 0))])
    optimizer.step()
    assert_close(p.detach(), before - 0.1 * (p.grad + 0.5 * before))


def test_maximize_climbs_both_losses():
    p, _ = optimizer_after(AGREEING, lr=0.1, maximize=True)
    # From zero, with weights of a half.
    assert_close(p.detach(), doubles(0.35, 0.15))


def test_grad_is_replaced_not_added_to():
    p, optimizer = optimizer_after()
    for _ in range(2):
        p.grad = doubles(100, 100)
        with pytest.warns(UserWarning, match="replaces what"):
            weights_next(optimizer, *AGREEING)
        weights = optimizer.last.weights
        assert_close(p.grad, weights @ doubles(*AGREEING))
        optimizer.step()


def test_grad_may_be_clipped_before_the_step():
    p, optimizer = optimizer_after(AGREEING, lr=1.0)
    before = p.detach().clone()
    weights_next(optimizer)
    torch.nn.utils.clip_grad_norm_([p], 0.5)
    optimizer.step()
    assert_close((p.detach() - before).norm().item(), 0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [list, tuple, iter, torch.stack, lambda losses: map(abs, losses)])
def test_losses_may_come_in_any_iterable(kind):
    p, optimizer = optimizer_after(CONFLICTING)
    record = optimizer.backward(kind([linear(p, (1, 1), 2.0), linear(p, (2, 0), 3.0)]))
    assert record.losses.tolist() == [2, 3]
    assert_close(p.grad, doubles(1 + 0.96, 1))


def test_a_sequence_may_share_its_graph():
    p, optimizer = optimizer_after(p=parameter(1.0, 2.0))
    shared = p.square().sum()
    optimizer.backward([shared, shared.sqrt()])
    assert_close(p.grad, doubles(1, 2) * (1 + 0.5 / math.sqrt(5)))


def test_other_leaves_get_their_gradient_before_the_priority_is_asked():
    x, seen = parameter(1.0, 2.0), []

    def oracle(losses):
        seen.append((x.grad.clone(), losses.clone(), losses.requires_grad))
        return 0

    p, optimizer = optimizer_after(p=parameter(3.0, 4.0), priority=oracle)
    record = optimizer.backward((p * x).sum() * factor for factor in (1, 10))
    assert_close(x.grad, 11 * p.detach())
    ((gradient, losses, attached),) = seen
    assert_same_bits(gradient, x.grad)
    assert_same_bits(losses, record.losses)
    assert not attached


def test_the_record_is_of_this_batch_and_the_moments_before_it():
    p, optimizer = optimizer_after(CONFLICTING, priority=Fixed(1))
    record = optimizer.backward([linear(p, (1, 1), 2.0), linear(p, (2, 0), 3.0)])
    assert record is optimizer.last
    assert_close(record.losses, doubles(2, 3))
    assert_close(record.weights, doubles(4 / 3, 1))
    assert_close(record.regularization, doubles(0, 0.5))
    assert_close(record.gramian, doubles([9, -12], [-12, 25]))
    assert_close(record.norms, doubles(3, 5))
    assert record.conflict.shape == ()
    assert bool(record.conflict)
    assert record.prioritized.shape == ()
    assert record.prioritized == 1
    assert not any(part.requires_grad for part in vars(record).values())


def test_the_record_keeps_its_values_when_training_goes_on():
    _, optimizer = optimizer_after(CONFLICTING)
    weights_next(optimizer)
    record = optimizer.last
    before = copy.deepcopy(record)
    optimizer.step()
    weights_next(optimizer)
    assert_same_bits(vars(record), vars(before))
    assert record is not optimizer.last


def test_weights_that_a_rule_computes_with_a_graph_are_detached():
    logits = parameter(1.0, 2.0)
    p, optimizer = optimizer_after(CONFLICTING, rule=lambda gramian: logits.softmax(0))
    weights_next(optimizer)
    assert not optimizer.last.weights.requires_grad
    assert not p.grad.requires_grad


gradient = st.tuples(*[st.floats(-1e30, 1e30)] * 2)


@settings(max_examples=40)
@given(gradient, gradient, st.floats(-1e30, 1e30), st.integers(0, 1))
def test_this_batch_cannot_change_its_weights(g_1, g_2, value, favoured):
    history = ((3, 0), (4, 3)), ((1, 2), (-5, 1)), ((-1, 2), (0, 2))
    _, optimizer = optimizer_after(*history, priority=Fixed(favoured))
    twin = copy.deepcopy(optimizer)
    p = twin.param_groups[0]["params"][0]
    weights_next(optimizer)
    twin.backward([linear(p, g_1, value), linear(p, g_2, value)])
    for part in ("weights", "regularization", "gramian", "norms", "conflict", "prioritized"):
        assert_same_bits(getattr(twin.last, part), getattr(optimizer.last, part))


@pytest.mark.parametrize("favoured", [0, 1])
@pytest.mark.parametrize("gradients", [AGREEING, CONFLICTING])
@pytest.mark.parametrize("length", ["mean_norm", "norm_of_mean"])
def test_a_loss_that_is_switched_on_late_is_weighed_as_one_that_was_there(
    favoured, gradients, length
):
    options = {"priority": Fixed(favoured), "rule": BisectorProjection(length=length)}
    switched_off = (gradients[0], (0.0, 0.0))
    _, late = optimizer_after(*[switched_off] * 200, gradients, **options)
    _, early = optimizer_after(gradients, **options)
    assert_close(weights_next(late), weights_next(early))


def test_the_gradients_of_a_batch_change_the_weights_of_the_next():
    _, optimizer = optimizer_after(AGREEING)
    weights_next(optimizer, *CONFLICTING)
    first = optimizer.last.weights
    optimizer.zero_grad()
    assert not torch.equal(weights_next(optimizer), first)


HISTORIES = {
    "agreement": [((3, 1), (4, 3)), ((2, 1), (1, 5))],
    "conflict": [((3, 1), (-4, 3)), ((2, 1), (-1, 1))],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("favoured", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_common_scale_of_the_losses_leaves_the_weights(history, scale, favoured, dtype):
    def weights(scale):
        _, optimizer = optimizer_after(
            *((scale * doubles(*pair)).tolist() for pair in history),
            p=parameter(0.0, 0.0, dtype=dtype),
            priority=Fixed(favoured),
        )
        return weights_next(optimizer)

    assert_close(weights(scale), weights(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("favoured", [0, 1])
@pytest.mark.parametrize("angle", [0.7, 2.0, math.pi])
def test_a_rotation_of_parameter_space_leaves_the_weights(history, favoured, angle):
    cos, sin = math.cos(angle), math.sin(angle)

    def rotated(x, y):
        return cos * x - sin * y, sin * x + cos * y

    _, straight = optimizer_after(*history, priority=Fixed(favoured))
    turned_history = [[rotated(*gradient) for gradient in pair] for pair in history]
    _, turned = optimizer_after(*turned_history, priority=Fixed(favoured))
    assert_close(weights_next(turned), weights_next(straight))


STREAMS = {
    "zero": ((0, 0), (0, 0)),
    "first zero": ((0, 0), (3, 4)),
    "second zero": ((3, 4), (0, 0)),
    "identical": ((3, 4), (3, 4)),
    "parallel": ((3, 4), (6, 8)),
    "opposite": ((3, 4), (-3, -4)),
    "orthogonal": ((3, 4), (-4, 3)),
    "tiny": ((3e-30, 4e-30), (1e-30, 0)),
    "huge": ((3e30, 4e30), (1e30, 0)),
    "tiny and huge": ((3e-30, 4e-30), (1e30, 0)),
    "huge and opposite tiny": ((3e30, 4e30), (-1e-30, 0)),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("favoured", [0, 1])
def test_weights_and_grad_are_finite_for_any_stream(stream, favoured):
    p, optimizer = optimizer_after(
        stream,
        stream,
        p=parameter(0.0, 0.0, dtype=torch.float32),
        priority=Fixed(favoured),
        rule=BisectorProjection(regularization=0.0),
    )
    for gradients in (stream, STREAMS["zero"], stream, STREAMS["tiny"]):
        assert weights_next(optimizer, *gradients).isfinite().all()
        assert p.grad.isfinite().all()
        optimizer.zero_grad()


def test_zero_gradients_forever_weigh_evenly_and_move_nothing():
    p, optimizer = optimizer_after(*[STREAMS["zero"]] * 3, lr=1.0)
    assert weights_next(optimizer, *STREAMS["zero"]).tolist() == [0.5, 0.5]
    assert p.tolist() == [0, 0]


def two_parameters(**options):
    p, q = parameter(0.0, 0.0), parameter(0.0)
    return p, q, UnbiasedMultiGradient([p, q], lr=0.1, **options)


def test_a_parameter_that_no_loss_reaches_keeps_none():
    p, q, optimizer = two_parameters(weight_decay=0.1)
    q.grad = doubles(1)
    optimizer.step(lambda: [linear(p, (1, 0)), linear(p, (0, 1))])
    assert p.grad is not None
    assert q.grad is None


def test_a_parameter_that_one_loss_reaches_gets_its_share():
    p, q, optimizer = two_parameters()
    for weights in ((0.5, 0.5), None):
        optimizer.zero_grad()
        record = optimizer.backward([linear(p, (3, 0)) + linear(q, (4,)), linear(p, (3, 4))])
        if weights:
            assert_close(record.weights, doubles(*weights))
        assert_close(q.grad, 4 * record.weights[:1])
    assert_close(record.norms, doubles(5, 5))
    assert_close(record.gramian, doubles([25, 9], [9, 25]))


def test_a_frozen_parameter_stays_and_learns_again_when_unfrozen():
    p, q, optimizer = two_parameters(moment_decay=(0.5, 0.5), rule=Constant([1.0]))

    def step():
        return optimizer.step(lambda: [linear(p, (1, 0)) + linear(q, (2,))])

    step()
    q.requires_grad_(False)
    at_rest = q.clone()
    for _ in range(2):
        assert step() is not None
        assert q.grad is None
        assert_same_bits(q, at_rest)
    # m̂ of q: 1, ½, ¼, and with t = 3 the correction is 7/8
    record = step()
    assert_close(record.gramian, doubles([1 + (0.25 / 0.875) ** 2]))
    q.requires_grad_()
    step()
    assert q.item() < at_rest.item()


def test_a_parameter_group_may_join_later_with_a_past_of_zeros():
    p, optimizer = optimizer_after(AGREEING, AGREEING, moment_decay=(0.5, 0.5))
    late = parameter(0.0)
    optimizer.add_param_group({"params": [late], "lr": 0.25})
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.25]
    assert optimizer.param_groups is optimizer.base.param_groups

    def losses():
        return [linear(p, g) + linear(late, (7,)) for g in AGREEING]

    record = optimizer.step(losses)
    assert_close(record.weights, doubles(2 / 3, 2 / 5))
    assert_close(late.detach(), doubles(-0.25 * 7 * (2 / 3 + 2 / 5)))
    # m of the late one is ½·7 / (1 - ½³) = 4
    record = optimizer.step(losses)
    assert_close(record.gramian, doubles([9, 12], [12, 25]) + 16)


def test_the_first_group_may_be_empty():
    p = parameter(0.0, 0.0)
    optimizer = UnbiasedMultiGradient([{"params": []}, {"params": [p]}], lr=0.1)
    optimizer.step(lambda: [linear(p, g) for g in AGREEING])
    assert_close(p.detach(), doubles(-0.35, -0.15))


def test_parameters_may_differ_in_dtype():
    half, single, double = (
        parameter(0.0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    optimizer = UnbiasedMultiGradient([half, single, double], lr=0.5)

    def losses():
        for sign in (1, -1):
            yield linear(half, (2,)).double() + sign * linear(single, (3,)) + linear(double, (6,))

    optimizer.step(losses)
    record = optimizer.step(losses)
    assert_close(record.gramian, doubles([49, 31], [31, 49]))
    assert [p.grad.dtype for p in (half, single, double)] == [
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ]


def test_plain_backward_and_step_are_the_bases():
    p, optimizer = optimizer_after(AGREEING, p=parameter(1.0, 2.0), lr=0.1, momentum=0.9)
    bare = parameter(*p.tolist())
    base = torch.optim.SGD([bare], lr=0.1, momentum=0.9)
    base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    moments = copy.deepcopy(optimizer.state_dict()["moments"])
    for q, stepper in ((p, optimizer), (bare, base)):
        stepper.zero_grad()
        q.square().sum().backward()
        assert stepper.step() is None
    assert_same_bits(p, bare)
    assert_same_bits(optimizer.state_dict()["moments"], moments)


def test_step_before_any_gradient_does_nothing():
    p, optimizer = optimizer_after(lr=0.1, p=parameter(1.0, 2.0), weight_decay=0.1)
    optimizer.step()
    assert p.tolist() == [1, 2]


def test_a_closure_that_returns_none_has_called_backward_itself():
    start = (1.0, -1.0)
    p, inside = optimizer_after(p=parameter(*start), lr=0.5, base=torch.optim.Adam)
    q, before = optimizer_after(p=parameter(*start), lr=0.5, base=torch.optim.Adam)
    r, plain = optimizer_after(p=parameter(*start), lr=0.5, base=torch.optim.Adam)
    for gradients in (AGREEING, CONFLICTING, CONFLICTING):

        def closure(gradients=gradients):
            inside.zero_grad()
            inside.backward([linear(p, gradient) for gradient in gradients])

        with torch.no_grad():
            assert inside.step(closure) is None

        before.zero_grad()
        before.backward([linear(q, gradient) for gradient in gradients])
        assert before.step(lambda: None) is None

        plain.zero_grad()
        plain.backward([linear(r, gradient) for gradient in gradients])
        plain.step()
        assert_same_bits(p, r)
        assert_same_bits(q, r)
        assert_same_bits(vars(inside.last), vars(plain.last))
    assert p.tolist() != list(start)


def test_step_of_a_closure_is_the_three_calls():
    a, in_one = optimizer_after(*HISTORIES["conflict"], lr=0.1, momentum=0.9)
    b, in_three = optimizer_after(*HISTORIES["conflict"], lr=0.1, momentum=0.9)
    for _ in range(3):
        calls = []

        def closure(calls=calls):
            calls.append(torch.is_grad_enabled())
            assert a.grad is None
            yield from (linear(a, g) for g in AGREEING)

        with torch.no_grad():
            record = in_one.step(closure)
        assert calls == [True]
        in_three.zero_grad()
        in_three.backward([linear(b, g) for g in AGREEING])
        assert in_three.step() is None
        assert_same_bits(vars(record), vars(in_three.last))
    assert record is in_one.last
    assert_same_bits(snapshot(in_one), snapshot(in_three))


def test_any_number_of_losses_works_with_a_rule_for_it():
    for losses in (1, 3, 5):
        p, optimizer = optimizer_after(rule=Constant([0.5] * losses))
        record = optimizer.backward(linear(p, (1, k)) for k in range(losses))
        assert record.weights.shape == record.norms.shape == (losses,)
        assert record.gramian.shape == (losses, losses)
        assert_close(p.grad, doubles(0.5 * losses, 0.5 * sum(range(losses))))


def test_the_priority_decides_by_the_losses_of_the_step():
    oracle = Threshold(lambda losses: losses[1], limit=2.5)
    _, optimizer = optimizer_after(CONFLICTING, priority=oracle)
    for value, favoured in ((2.0, 0), (3.0, 1)):
        now = copy.deepcopy(optimizer)
        q = now.param_groups[0]["params"][0]
        record = now.backward([linear(q, (1, 0)), linear(q, (0, 1), value)])
        assert record.prioritized == favoured
        assert_close(record.weights, doubles(4 / 3, 1) if favoured else doubles(1, 12 / 25))


@pytest.mark.parametrize("answer", [1, torch.tensor(1), torch.tensor(1, dtype=torch.uint8)])
def test_the_priority_may_answer_in_any_kind_of_integer(answer):
    _, optimizer = optimizer_after(CONFLICTING, priority=lambda _: answer)
    assert_close(weights_next(optimizer), doubles(4 / 3, 1))


def test_a_priority_and_a_rule_that_work_in_place_change_nothing():
    class InPlace(Rule):
        def __call__(self, gramian, norms, prioritized):
            weighting = BisectorProjection()(gramian, norms, prioritized)
            for argument in (gramian, norms, prioritized):
                argument.fill_(7)
            return weighting

    def last(rule, priority):
        point = parameter(0.5, 0.5)
        optimizer = UnbiasedMultiGradient([point], lr=0.1, rule=rule, priority=priority)
        for _ in range(20):
            optimizer.step(lambda: [(point - 1).square().sum(), (point + 1).norm()])
        return optimizer.last

    scale = torch.tensor([1.0, 9.0])
    plain = last(BisectorProjection(), lambda losses: losses.mul(scale).argmax())
    changed = last(InPlace(), lambda losses: losses.mul_(scale).argmax())
    for name in ("losses", "weights", "regularization", "gramian", "norms", "prioritized"):
        assert torch.equal(getattr(plain, name), getattr(changed, name)), name


def test_what_it_weighs_by_is_told_and_not_to_be_set():
    layer = torch.nn.Linear(2, 1)
    optimizer = UnbiasedMultiGradient(layer.parameters(), lr=0.1, weigh_by=[layer.bias])
    assert optimizer.weigh_by == {layer.bias}
    assert UnbiasedMultiGradient(layer.parameters(), lr=0.1).weigh_by is None
    with pytest.raises(AttributeError, match="weigh_by"):
        optimizer.weigh_by = [layer.weight]
