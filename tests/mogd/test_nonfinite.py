import copy
import math
from contextlib import nullcontext

import pytest
import torch
from chosen import AGREEING, CONFLICTING, assert_same_bits, linear, optimizer_after, snapshot
from torch.testing import assert_close

from mogd import Constant, UnbiasedMultiGradient


def root(p):
    """A loss of 0 whose gradient is infinite."""
    return (p - p.detach()).sum().sqrt()


POISONS = {
    "loss nan": lambda p: linear(p, (1, 1)) + math.nan,
    "loss inf": lambda p: linear(p, (1, 1)) + math.inf,
    "loss -inf": lambda p: linear(p, (1, 1)) - math.inf,
    "gradient inf": root,
    "gradient nan": lambda p: 0.0 * root(p),
    "both nan": lambda p: math.nan * linear(p, (1, 1)),
}
poisons = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
HISTORIES = {"first": [], "later": [CONFLICTING, AGREEING, CONFLICTING]}
histories = pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)


def trained(history, **options):
    return optimizer_after(*history, base=torch.optim.Adam, lr=0.1, weight_decay=0.1, **options)


def poisoned(p, position, poison):
    losses = [linear(p, g) for g in AGREEING]
    losses[position] = poison(p)
    return losses


def continue_as(optimizer, undisturbed):
    """Both take the same next step to the same bits."""
    for each in (optimizer, undisturbed):
        p = each.param_groups[0]["params"][0]
        each.step(lambda p=p: [linear(p, g) for g in AGREEING])
    assert_same_bits(snapshot(optimizer) | {"skipped": 0}, snapshot(undisturbed))


def test_the_poisons_are_what_their_names_say():
    p, _ = trained(HISTORIES["later"])
    for name, poison in POISONS.items():
        loss = poison(p)
        (gradient,) = torch.autograd.grad(loss, p)
        assert loss.isfinite() == name.startswith("gradient")
        assert gradient.isfinite().all() == name.startswith("loss")


@poisons
@histories
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", [list, iter])
def test_raise_names_the_loss_and_changes_nothing(poison, history, position, kind):
    p, optimizer = trained(history)
    _, undisturbed = trained(history)
    before, last = snapshot(optimizer), optimizer.last
    with pytest.raises(FloatingPointError, match=rf"losses\[{position}\], or the gradient of it"):
        optimizer.backward(kind(poisoned(p, position, poison)))
    assert p.grad is None
    assert optimizer.last is last
    assert optimizer.skipped == 0
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    continue_as(optimizer, undisturbed)


@poisons
@histories
@pytest.mark.parametrize("position", [0, 1])
def test_skip_changes_nothing_and_counts(poison, history, position):
    p, optimizer = trained(history, nonfinite="skip")
    _, undisturbed = trained(history)
    before = snapshot(optimizer)
    for count in (1, 2):
        optimizer.zero_grad()
        optimizer.backward(poisoned(p, position, poison))
        assert p.grad is None
        optimizer.step()
        assert optimizer.skipped == count
        assert_same_bits(snapshot(optimizer), before | {"skipped": count})
    continue_as(optimizer, undisturbed)
    assert optimizer.skipped == 2


def test_every_loss_at_fault_is_named():
    p, optimizer = optimizer_after(rule=Constant([1, 1, 1]))
    bad = POISONS["loss nan"]
    with pytest.raises(FloatingPointError, match=r"losses\[0\] and losses\[2\], or the gradient"):
        optimizer.backward([bad(p), linear(p, (1, 0)), bad(p)])


def test_skip_returns_the_record_of_the_step():
    p, optimizer = trained(HISTORIES["later"], nonfinite="skip")
    record = optimizer.step(lambda: poisoned(p, 1, POISONS["loss nan"]))
    assert record is optimizer.last
    assert record.losses.isnan().tolist() == [False, True]
    assert record.weights.isfinite().all()


def test_the_base_is_not_asked_to_step_along_a_skipped_batch():
    p, optimizer = trained(HISTORIES["later"], nonfinite="skip")
    steps = []
    optimizer.base.register_step_post_hook(lambda *_: steps.append(1))
    for poison, taken in ((root, 0), (lambda p: linear(p, (1, 1)), 1)):
        optimizer.backward(poisoned(p, 0, poison))
        optimizer.step()
        assert len(steps) == taken


def test_a_good_batch_right_after_a_skipped_one_is_stepped_along():
    p, optimizer = trained(HISTORIES["later"], nonfinite="skip")
    _, undisturbed = trained(HISTORIES["later"])
    optimizer.backward(poisoned(p, 0, root))
    optimizer.backward([linear(p, g) for g in AGREEING])
    optimizer.step()
    q = undisturbed.param_groups[0]["params"][0]
    undisturbed.step(lambda: [linear(q, g) for g in AGREEING])
    assert_same_bits(snapshot(optimizer) | {"skipped": 0}, snapshot(undisturbed))


def test_plain_training_goes_on_after_a_skipped_batch():
    p, optimizer = optimizer_after(AGREEING, lr=0.1, nonfinite="skip")
    before = p.detach().clone()
    optimizer.backward(poisoned(p, 0, root))
    optimizer.zero_grad()
    linear(p, (1, 2)).backward()
    optimizer.step()
    assert_close(p.detach(), before - 0.1 * torch.tensor([1, 2]))


def test_plain_training_goes_on_after_a_skipped_batch_that_the_model_forgot():
    p, optimizer = optimizer_after(AGREEING, lr=0.1, nonfinite="skip")
    before = p.detach().clone()
    optimizer.backward(poisoned(p, 0, root))
    p.grad = None  # as model.zero_grad() does
    linear(p, (1, 2)).backward()
    optimizer.step()
    assert_close(p.detach(), before - 0.1 * torch.tensor([1, 2]))


@poisons
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_no_oracle_is_asked_about_what_is_not_finite(poison, nonfinite):
    asked = []

    def oracle(losses):
        asked.append(losses)
        return 1

    p, optimizer = optimizer_after(CONFLICTING, priority=oracle, nonfinite=nonfinite)
    raises = pytest.raises(FloatingPointError) if nonfinite == "raise" else nullcontext()
    with raises:
        record = optimizer.backward(poisoned(p, 1, poison))
        assert (record.prioritized.item(), record.finite.tolist()) == (0, [True, False])
    assert len(asked) == 1
    optimizer.backward([linear(p, g) for g in AGREEING])
    assert len(asked) == 2


def test_an_optimizer_made_where_another_device_is_the_default_trains():
    p = torch.zeros(2, requires_grad=True)
    good, bad = [linear(p, g) for g in AGREEING], poisoned(p, 0, root)
    with torch.device("meta"):
        optimizer = UnbiasedMultiGradient([p], lr=0.1, nonfinite="skip")
        optimizer.backward(good)
        optimizer.zero_grad()
        record = optimizer.backward(bad)
    assert optimizer.skipped == 1
    assert record.prioritized.device == p.device


def test_one_entry_of_one_parameter_is_enough():
    p, q = torch.zeros(1000, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = UnbiasedMultiGradient([q, p], lr=0.1)
    entry = torch.zeros(1000)
    entry[777] = math.inf
    with pytest.raises(FloatingPointError, match=r"losses\[0\]"):
        optimizer.backward([linear(q, (1,)) + (p * entry).sum().nan_to_num(0), linear(q, (1,))])


def test_gradients_nearly_as_large_as_float32_allows_are_finite():
    p, optimizer = optimizer_after(p=torch.zeros(2, requires_grad=True))
    largest = torch.finfo(torch.float32).max / 4
    record = optimizer.backward([linear(p, (largest, largest)), linear(p, (-largest, 1))])
    assert record.weights.tolist() == [0.5, 0.5]
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("weights", [(math.nan, 1.0), (1e30, 1.0), (math.inf, 0.0)])
def test_weights_that_leave_the_range_of_floats_reach_nothing(weights, nonfinite):
    p = torch.zeros(2, requires_grad=True)
    optimizer = UnbiasedMultiGradient(
        [p], lr=0.1, rule=lambda _: torch.tensor(weights), nonfinite=nonfinite
    )
    optimizer.step(lambda: [linear(p, (1, 0)), linear(p, (0, 1))])  # weighed by 1/2 as yet
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["moments"])

    def large():
        return [linear(p, (1e10, 0)), linear(p, (0, 1))]

    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="sum of the gradients, weighed by"):
            optimizer.step(large)
    else:
        optimizer.step(large)
        assert optimizer.skipped == 1
    assert torch.equal(p.detach(), before)
    after = optimizer.state_dict()["moments"]
    assert torch.equal(after["gramian"], state["gramian"])
    assert torch.equal(after["exp_avg"][0], state["exp_avg"][0])
    assert int(after["count"]) == 1


def test_moments_that_swing_from_end_to_end_of_float32_stay_finite():
    """What a moment moves by is a difference, which must be a number, too."""
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = UnbiasedMultiGradient([p], lr=0.0, moment_decay=(0.0, 0.5), nonfinite="skip")
    optimizer.rule = Constant((0.5, 0.5))
    for entry in (2e38, -2e38, 1.0, 1.5e38, -1.5e38):
        optimizer.step(lambda entry=entry: [entry * p.sum(), p.sum()])
    assert optimizer.skipped == 2
    assert all(m.isfinite().all() for m in optimizer.state_dict()["moments"]["exp_avg"].values())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_range_is_that_of_the_narrowest_parameter(order):
    wide, narrow = torch.nn.Parameter(torch.zeros(1).double()), torch.nn.Parameter(torch.zeros(1))
    parameters = [(wide, narrow)[position] for position in order]
    optimizer = UnbiasedMultiGradient(parameters, lr=0.1, rule=Constant((1e30, 1.0)))
    with pytest.raises(FloatingPointError, match="the sum of the gradients, weighed"):
        optimizer.step(lambda: [1e10 * narrow.sum() + wide.sum(), wide.sum()])
    assert narrow.item() == wide.item() == 0


def test_a_frozen_parameter_of_eight_bits_is_not_asked_for_its_range():
    p = torch.nn.Parameter(torch.zeros(2))
    frozen = torch.nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    optimizer = UnbiasedMultiGradient([p, frozen], lr=0.1)
    optimizer.step(lambda: [linear(p, gradient) for gradient in AGREEING])
    assert optimizer.last.finite.all()
