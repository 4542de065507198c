"""Mixed precision: autocast, GradScaler, parameters in half precision."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mogd import Fixed, Rule, UnbiasedMultiGradient, Weighting

SCALE = 2.0**12  # a power of two: scaling and unscaling are exact


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def objectives(model: nn.Module, step: int):
    """Two losses of one batch that cannot both be met."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator)
    yield (model(x) - x[:, :2]).square().mean()
    yield (model(x) + 2 * x[:, 1:]).square().mean()


def pair(**options) -> tuple[nn.Module, UnbiasedMultiGradient]:
    model = network()
    optimizer = UnbiasedMultiGradient(
        model.parameters(), torch.optim.Adam, moment_decay=(0.5, 0.8), priority=Fixed(1), **options
    )
    return model, optimizer


def moments(optimizer: UnbiasedMultiGradient) -> list[Tensor]:
    state = optimizer.state_dict()["moments"]
    tensors = [state["count"], state["norms"], state["gramian"], *state["exp_avg"].values()]
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(ours, others) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def test_autocast_trains():
    model, optimizer = pair(lr=0.02)
    before = sum(loss.item() for loss in objectives(model, 0))
    for step in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            record = optimizer.step(lambda step=step: objectives(model, step))
    assert sum(loss.item() for loss in objectives(model, 0)) < before
    assert record.weights.dtype == record.gramian.dtype == torch.float64
    assert all(tensor.dtype == torch.float32 for tensor in moments(optimizer)[3:])


@pytest.mark.parametrize("clip", [None, 0.05])
def test_scaled_in_float32_is_unscaled_to_the_bit(clip):
    """The weights, the moments, what clipping sees and the parameters."""
    model, optimizer = pair()
    twin, plain = pair()
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    regularized = 0
    for step in range(8):
        optimizer.zero_grad()
        record = optimizer.backward(objectives(model, step), scaler=scaler)
        scaler.unscale_(optimizer)
        plain.zero_grad()
        expected = plain.backward(objectives(twin, step))
        if clip is not None:
            norms = [
                nn.utils.clip_grad_norm_(net.parameters(), clip, foreach=False)
                for net in (model, twin)
            ]
            assert torch.equal(*norms)
        scaler.step(optimizer)
        scaler.update()
        plain.step()
        assert_same_bits(vars(record).values(), vars(expected).values())
        assert_same_bits(moments(optimizer), moments(plain))
        assert_same_bits(model.parameters(), twin.parameters())
        regularized += int(record.regularization.sum() > 0)
    assert scaler.get_scale() == 4 * SCALE  # it grew meanwhile
    assert regularized > 0  # 2 κ_reg L is of the unscaled loss


def test_step_without_unscale():
    model, optimizer = pair()
    twin, plain = pair()
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        optimizer.backward(objectives(model, step), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        plain.backward(objectives(twin, step))
        plain.step()
    assert_same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaler_with_autocast(dtype):
    """Close to what float32 does, although the small gradients of float16 would be lost."""
    model, optimizer = pair()
    twin, plain = pair()
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            losses = [1e-3 * loss for loss in objectives(model, step)]
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        plain.step(lambda step=step: (1e-3 * loss for loss in objectives(twin, step)))
    torch.testing.assert_close(optimizer.last.norms, plain.last.norms, rtol=0.05, atol=0.0)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0.0, atol=2e-3)


def overflowing(model: nn.Module, step: int):
    """Finite losses; the gradient of the second overflows once it is scaled."""
    yield next(objectives(model, step))
    yield model[0].weight.sum() * 1e38


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_overflow_skips_the_step_and_training_goes_on(nonfinite):
    model, optimizer = pair(nonfinite=nonfinite)
    twin, plain = pair()
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(6):
        optimizer.zero_grad()
        if step == 3:
            weights = [parameter.clone() for parameter in model.parameters()]
            past = moments(optimizer)
            optimizer.backward(overflowing(model, step), scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == SCALE / 2
            assert optimizer.skipped == 1
            assert_same_bits(model.parameters(), weights)
            assert_same_bits(moments(optimizer), past)
            continue
        optimizer.backward(objectives(model, step), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        plain.step(lambda step=step: objectives(twin, step))
    assert_same_bits(model.parameters(), twin.parameters())


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_weights_that_are_not_finite_are_no_overflow(nonfinite):
    """No scale would mend them."""
    model, optimizer = pair(nonfinite=nonfinite, rule=lambda gramian: gramian[0] * torch.nan)
    scaler = GradScaler("cpu", init_scale=SCALE)
    optimizer.backward(objectives(model, 0), scaler=scaler)  # a half each, whatever the rule says
    raises = pytest.raises(FloatingPointError, match=r"weighed by \[nan, nan\]")
    with raises if nonfinite == "raise" else contextlib.nullcontext():
        optimizer.backward(objectives(model, 1), scaler=scaler)
    assert optimizer.skipped == (nonfinite == "skip")


class Squares(Rule):
    """Halves of the squared losses."""

    def __call__(self, gramian, norms, prioritized):
        return Weighting(torch.zeros_like(norms), torch.full_like(norms, 0.5))


def test_weights_that_a_loss_makes_infinite_are_an_overflow():
    model, optimizer = pair(rule=Squares())
    losses = (1e-40 * loss + torch.inf for loss in objectives(model, 0))
    weights = [parameter.clone() for parameter in model.parameters()]
    scaler = GradScaler("cpu", init_scale=SCALE)
    record = optimizer.backward(losses, scaler=scaler)
    assert (record.finite.tolist(), optimizer.skipped) == ([False, False], 1)
    scaler.step(optimizer)
    assert_same_bits(model.parameters(), weights)


def test_disabled_scaler_is_none():
    model, optimizer = pair()
    twin, plain = pair()
    scaler = GradScaler("cpu", enabled=False)
    for step in range(3):
        optimizer.backward(objectives(model, step), scaler=scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        plain.step(lambda step=step: objectives(twin, step))
    assert_same_bits(model.parameters(), twin.parameters())


def test_disabled_scaler_lets_nothing_nonfinite_through():
    """It would step whatever `.grad` holds, so `nonfinite` must apply."""
    scaler = GradScaler("cpu", enabled=False)
    point = nn.Parameter(torch.ones(2))
    optimizer = UnbiasedMultiGradient([point], nonfinite="skip")
    optimizer.backward([point.sum(), (point / 0).sum()], scaler=scaler)
    scaler.step(optimizer)
    assert point.tolist() == [1.0, 1.0]
    assert optimizer.skipped == 1
    strict = UnbiasedMultiGradient([point])
    with pytest.raises(FloatingPointError, match=r"losses\[1\]"):
        strict.backward([point.sum(), (point / 0).sum()], scaler=scaler)


def test_accumulate_with_scaler():
    model, optimizer = pair()
    twin, plain = pair()
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(0, 6, 2):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward(objectives(model, step), scaler=scaler)
        record = optimizer.backward(objectives(model, step + 1), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        micro_batches = zip(objectives(twin, step), objectives(twin, step + 1), strict=True)
        expected = plain.step(lambda parts=micro_batches: [sum(losses) for losses in parts])
        torch.testing.assert_close(vars(record), vars(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments(optimizer), moments(plain), rtol=1e-4, atol=1e-6)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_moments(dtype):
    """¾ (1 + eps) + 1 does not fit the dtype, so no average may have been rounded to it."""
    eps = torch.finfo(dtype).eps
    point = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = UnbiasedMultiGradient([point], lr=0.25, moment_decay=(0.75, 0.75))
    for gradient in (1 + eps, 1.0):
        optimizer.zero_grad()
        optimizer.backward([(point * gradient).sum(), point.sum()])
    assert point.grad.dtype == dtype
    (exp_avg,) = optimizer.state_dict()["moments"]["exp_avg"].values()
    assert exp_avg.dtype == torch.float32
    exact = 0.25 * (0.75 * (1 + eps) + 1)
    assert exp_avg[0].tolist() == [exact, exact]
    assert exp_avg[0, 0].to(dtype).item() != exact
    optimizer.step()
    assert (point < 1).all()
    assert point.dtype == dtype


def fed(dtype: torch.dtype) -> tuple[nn.Parameter, UnbiasedMultiGradient]:
    """After 60 noisy gradients of two losses, rounded to the dtype of the parameter."""
    generator = torch.Generator().manual_seed(0)
    point = nn.Parameter(torch.zeros(500, dtype=dtype))
    optimizer = UnbiasedMultiGradient([point], lr=0.0, moment_decay=(0.99, 0.99))
    mean = torch.randn(2, 500, generator=generator)
    for _ in range(60):
        of_step = (mean + torch.randn(2, 500, generator=generator)).to(dtype)
        optimizer.step(lambda of_step=of_step: [(point * row).sum() for row in of_step])
    return point, optimizer


def test_moments_of_bfloat16_gradients_are_those_of_float32_but_for_the_rounding_of_each():
    """What averages in bfloat16 would lose: its steps of 0.01 (g - m) are less than half an ulp."""
    _, optimizer = fed(torch.bfloat16)
    _, expected = fed(torch.float32)
    (ours,) = optimizer.state_dict()["moments"]["exp_avg"].values()
    (others,) = expected.state_dict()["moments"]["exp_avg"].values()
    assert ours.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    assert (ours - others).norm() < eps / 4 * others.norm()
    for name in ("gramian", "norms", "weights"):
        found, exact = getattr(optimizer.last, name), getattr(expected.last, name)
        assert found.dtype == torch.float64
        assert (found - exact).norm() < eps / 4 * exact.norm()


def test_the_state_of_bfloat16_parameters_loads_with_weights_only_to_the_same_bits(tmp_path):
    point, optimizer = fed(torch.bfloat16)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = nn.Parameter(point.detach().clone())
    resumed = UnbiasedMultiGradient([again], lr=0.0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert_same_bits(moments(resumed), moments(optimizer))
    assert moments(resumed)[3].dtype == torch.float32
    row = torch.linspace(-1, 1, 500).bfloat16()
    for p, of in ((point, optimizer), (again, resumed)):
        of.step(lambda p=p: [(p * row).sum(), p.sum()])
    assert torch.equal(optimizer.last.weights, resumed.last.weights)
    assert_same_bits(moments(resumed), moments(optimizer))


def test_a_batch_that_was_skipped_and_not_stepped_does_not_stop_the_next_one_with_a_scaler():
    model, optimizer = pair(nonfinite="skip")
    scaler = GradScaler("cpu")
    optimizer.backward([loss * torch.inf for loss in objectives(model, 0)])
    model.zero_grad()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.backward(objectives(model, 1), scaler=scaler)
    scaler.step(optimizer)
    for now, then in zip(model.parameters(), before, strict=True):
        assert not torch.equal(now, then)
