import contextlib
import copy

import pytest
import torch
from chosen import (
    AGREEING,
    CONFLICTING,
    assert_same_bits,
    doubles,
    linear,
    optimizer_after,
    snapshot,
)
from torch.testing import assert_close

from mogd import Fixed, UnbiasedMultiGradient

BATCH, STEPS = 12, 4


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()


def batches():
    torch.manual_seed(1)
    return [(torch.randn(BATCH, 3).double(), torch.randn(BATCH, 2).double()) for _ in range(STEPS)]


def objectives(network, x, y, share=1):
    yield (network(x) - y).square().mean() / share
    yield (network(x) + 3 * y).abs().mean() / share


def options(network, favoured):
    return {"params": network.parameters(), "lr": 0.1, "priority": Fixed(favoured)}


@pytest.mark.parametrize("favoured", [0, 1])
@pytest.mark.parametrize("parts", [2, 3, 12])
@pytest.mark.parametrize("kind", [iter, list])
def test_micro_batches_equal_the_whole_batch(favoured, parts, kind):
    whole, split = model(), model()
    of_whole = UnbiasedMultiGradient(**options(whole, favoured))
    of_split = UnbiasedMultiGradient(**options(split, favoured))
    conflicts = 0
    for x, y in batches():
        of_whole.zero_grad()
        expected = of_whole.backward(kind(tuple(objectives(whole, x, y))))
        of_split.zero_grad()
        *inner, last = zip(x.chunk(parts), y.chunk(parts), strict=True)
        with of_split.accumulate():
            for micro in inner:
                assert of_split.backward(kind(tuple(objectives(split, *micro, parts)))) is None
        record = of_split.backward(kind(tuple(objectives(split, *last, parts))))
        assert_close(vars(record), vars(expected))
        for p, q in zip(split.parameters(), whole.parameters(), strict=True):
            assert_close(p.grad, q.grad)
        of_whole.step()
        of_split.step()
        assert_close(snapshot(of_split), snapshot(of_whole))
        conflicts += int(expected.conflict)
    assert conflicts > 0


def test_a_closure_may_gather_micro_batches_before_it_returns_the_last_losses():
    whole, split = model(), model()
    of_whole = UnbiasedMultiGradient(**options(whole, 1))
    of_split = UnbiasedMultiGradient(**options(split, 1))
    for x, y in batches():

        def closure(x=x, y=y):
            *inner, last = zip(x.chunk(3), y.chunk(3), strict=True)
            with of_split.accumulate():
                for micro in inner:
                    of_split.backward(objectives(split, *micro, 3))
            return objectives(split, *last, 3)

        of_whole.step(lambda x=x, y=y: objectives(whole, x, y))
        of_split.step(closure)
        assert_close(snapshot(of_split), snapshot(of_whole))


def test_what_was_gathered_before_a_closure_is_dropped_as_by_zero_grad():
    p, optimizer = accumulated(AGREEING)
    same_p, same = optimizer_after(CONFLICTING)
    for of, q in ((optimizer, p), (same, same_p)):
        of.step(lambda q=q: [linear(q, g) for g in AGREEING])
    assert_same_bits(snapshot(optimizer), snapshot(same))


def accumulated(*micro_batches, **options):
    """An optimizer after a conflict, with micro-batches that were not yet combined."""
    p, optimizer = optimizer_after(CONFLICTING, **options)
    for gradients in micro_batches:
        with optimizer.accumulate():
            optimizer.backward([linear(p, g) for g in gradients])
    return p, optimizer


def test_nothing_changes_while_gradients_accumulate():
    p, optimizer = optimizer_after(CONFLICTING, lr=0.1)
    before, last = snapshot(optimizer), optimizer.last
    with optimizer.accumulate():
        for _ in range(2):
            assert optimizer.backward([linear(p, g) for g in AGREEING]) is None
            assert p.grad is None
    assert optimizer.last is last
    assert_same_bits(snapshot(optimizer), before)


def test_the_first_call_outside_combines():
    p, optimizer = accumulated(AGREEING, CONFLICTING)
    optimizer.backward([linear(p, (1, 1)), linear(p, (2, 2))])
    # κ = (1, 12/25) of the step before; Σ g₁ = (7, 1), Σ g₂ = (2, 8)
    assert_close(p.grad, doubles(7, 1) + 0.48 * doubles(2, 8))
    optimizer.zero_grad()
    record = optimizer.backward([linear(p, (1, 1)), linear(p, (2, 2))])
    # The sums were one step: m = (0.9·g + Σg) / 1.9
    m = (
        torch.stack([0.9 * doubles(3, 0) + doubles(7, 1), 0.9 * doubles(-4, 3) + doubles(2, 8)])
        / 1.9
    )
    assert_close(record.gramian, m @ m.T)
    assert_close(p.grad, record.weights @ doubles([1, 1], [2, 2]))


def test_a_copy_made_inside_is_not_inside_itself():
    p, optimizer = optimizer_after(AGREEING)
    with optimizer.accumulate():
        optimizer.backward([linear(p, g) for g in AGREEING])
        twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    for each, parameter in ((twin, q), (optimizer, p)):
        record = each.backward([linear(parameter, g) for g in CONFLICTING])
        assert record is not None
    assert_same_bits(q.grad, p.grad)


def test_the_losses_of_the_record_are_the_sums():
    p, optimizer = optimizer_after()
    with optimizer.accumulate():
        optimizer.backward([linear(p, (1, 0), 2.0), linear(p, (0, 1), 3.0)])
    record = optimizer.backward([linear(p, (1, 0), 20.0), linear(p, (0, 1), 30.0)])
    assert record.losses.tolist() == [22, 33]


def test_the_priority_is_asked_once_about_the_sums():
    asked = []
    p, optimizer = optimizer_after(priority=lambda losses: asked.append(losses.tolist()) or 0)
    with optimizer.accumulate():
        optimizer.backward([linear(p, (1, 0), 2.0), linear(p, (0, 1), 3.0)])
    assert asked == []
    optimizer.backward([linear(p, (1, 0), 20.0), linear(p, (0, 1), 30.0)])
    assert asked == [[22, 33]]


def test_nested_contexts_accumulate_until_the_outermost_ends():
    p, optimizer = optimizer_after()
    losses = ((1, 0), (0, 1))
    with optimizer.accumulate():
        with optimizer.accumulate():
            assert optimizer.backward([linear(p, g) for g in losses]) is None
        assert optimizer.backward([linear(p, g) for g in losses]) is None
    optimizer.backward([linear(p, g) for g in losses])
    assert_close(p.grad, doubles(1.5, 1.5))


def test_a_parameter_may_be_reached_by_some_micro_batches_only():
    p, q = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = UnbiasedMultiGradient([p, q], lr=0.1)
    with optimizer.accumulate():
        optimizer.backward([linear(p, (1,)), linear(q, (2,))])
    optimizer.backward([linear(q, (10,)), linear(q, (20,))])
    assert p.grad.tolist() == [0.5]
    assert q.grad.tolist() == [16]


def test_a_step_with_gradients_not_combined_is_refused():
    p, optimizer = accumulated(AGREEING, lr=0.1)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="accumulated but not combined"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.backward([linear(p, g) for g in AGREEING])
    assert optimizer.step() is None


def test_a_closure_inside_the_context_is_refused():
    p, optimizer = optimizer_after(lr=0.1)
    with optimizer.accumulate(), pytest.raises(RuntimeError, match="belongs outside accumulate"):
        optimizer.step(lambda: [linear(p, g) for g in AGREEING])
    assert p.tolist() == [0, 0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_what_was_accumulated(set_to_none):
    p, optimizer = accumulated(AGREEING)
    optimizer.zero_grad(set_to_none)
    optimizer.step()
    optimizer.backward([linear(p, (1, 0)), linear(p, (0, 1))])
    assert_close(p.grad, doubles(1, 0.48))


@pytest.mark.parametrize(("losses", "found"), [(1, "1"), (3, "more")])
@pytest.mark.parametrize("inside", [True, False])
def test_another_number_of_losses_in_a_micro_batch_is_refused_and_drops_all(losses, found, inside):
    p, optimizer = accumulated(AGREEING)
    before = snapshot(optimizer)
    wrong = [linear(p, (k, 1)) for k in range(losses)]
    context = optimizer.accumulate() if inside else contextlib.nullcontext()
    message = f"must be 2 as in the micro-batch before, got {found}"
    with pytest.raises(ValueError, match=message), context:
        optimizer.backward(wrong)
    assert p.grad is None
    assert_same_bits(snapshot(optimizer), before)
    optimizer.backward([linear(p, (1, 0)), linear(p, (0, 1))])
    assert_close(p.grad, doubles(1, 0.48))


def test_an_exception_in_the_context_ends_it():
    p, optimizer = optimizer_after()
    with pytest.raises(KeyError), optimizer.accumulate():
        raise KeyError
    assert optimizer.backward([linear(p, g) for g in AGREEING]) is not None


@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_micro_batch_that_is_not_finite_spoils_the_step_and_no_other(poisoned, nonfinite):
    p, optimizer = optimizer_after(CONFLICTING, lr=0.1, nonfinite=nonfinite)
    before = snapshot(optimizer)

    def backward(index):
        factor = float("nan") if index == poisoned else 1.0
        return optimizer.backward([linear(p, (1, 1)), factor * linear(p, (1, 0))])

    with optimizer.accumulate():
        backward(0)
        backward(1)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"losses\[1\]"):
            backward(2)
    else:
        backward(2)
        assert optimizer.skipped == 1
    optimizer.step()
    assert_same_bits(snapshot(optimizer) | {"skipped": 0}, before)
    record = optimizer.backward([linear(p, (1, 0)), linear(p, (0, 1))])
    assert_close(record.weights, doubles(1, 0.48))
    assert_close(p.grad, doubles(1, 0.48))


def test_an_error_inside_drops_what_was_added_up():
    p, optimizer = optimizer_after()

    def runs_out_of_memory():
        with optimizer.accumulate():
            optimizer.backward([linear(p, (5, 0)), linear(p, (0, 5))])
            raise MemoryError

    with pytest.raises(MemoryError):
        runs_out_of_memory()
    record = optimizer.backward([linear(p, (1, 0)), linear(p, (0, 2))])
    assert_close(p.grad, record.weights * doubles(1, 2))


@pytest.mark.parametrize("scaled", [(True, False), (False, True)])
def test_a_scaler_in_some_micro_batches_alone_is_refused(scaled):
    p, optimizer = optimizer_after()
    scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=1024.0)
    first, second = (scaler if given else None for given in scaled)
    with optimizer.accumulate():
        optimizer.backward([linear(p, gradient) for gradient in AGREEING], scaler=first)
    with pytest.raises(ValueError, match="scaler must be as in the micro-batch before"):
        optimizer.backward([linear(p, gradient) for gradient in AGREEING], scaler=second)
