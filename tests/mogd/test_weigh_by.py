"""Weights from the gradients of some parameters alone."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from mogd import Fixed, UnbiasedMultiGradient


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def losses(model: nn.Module, step: int) -> list[Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    return [(model(x) - x[:, :2]).square().mean(), (model(x) + 2 * x[:, 1:]).square().mean()]


def made(model: nn.Sequential) -> UnbiasedMultiGradient:
    return UnbiasedMultiGradient(
        model.parameters(), torch.optim.Adam, lr=0.05, weigh_by=[model[0].weight]
    )


def train(model: nn.Module, optimizer: UnbiasedMultiGradient, steps: range) -> list[Tensor]:
    return [optimizer.step(lambda step=step: losses(model, step)).weights for step in steps]


def test_gramian_and_norms_are_of_the_named_parameters_and_the_step_of_all():
    """a has the gradients (3, 0) and (-1, 1), b the far longer 100 and 200."""
    a, b = pair()
    optimizer = UnbiasedMultiGradient([a, b], lr=0.1, weigh_by=[a], priority=Fixed(0))

    def objectives() -> list[Tensor]:
        return [3 * a[0] + 100 * b[0], -a[0] + a[1] + 200 * b[0]]

    first = optimizer.backward(objectives())
    assert first.weights.tolist() == [0.5, 0.5]
    assert a.grad.tolist() == [1.0, 0.5]
    assert b.grad.tolist() == [150.0]

    optimizer.zero_grad()
    second = optimizer.backward(objectives())

    torch.testing.assert_close(
        second.gramian, torch.tensor([[9.0, -3.0], [-3.0, 2.0]], dtype=torch.float64)
    )
    torch.testing.assert_close(second.norms, torch.tensor([3.0, 2**0.5], dtype=torch.float64))
    assert second.conflict  # by a; by all parameters they agree
    assert second.weights.tolist() == pytest.approx([1.0, 1.5])  # -⟨m₁, m₂⟩ / v₂² = 3 / 2
    torch.testing.assert_close(a.grad, torch.tensor([1.5, 1.5]))
    torch.testing.assert_close(b.grad, torch.tensor([400.0]))


def test_by_default_and_by_all_of_them_are_the_same():
    runs = []
    for weigh_by in (None, "all"):
        model = network()
        named = None if weigh_by is None else list(model.parameters())
        optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05, weigh_by=named)
        train(model, optimizer, range(5))
        runs.append([optimizer.last.gramian, *model.parameters()])
    assert all(map(torch.equal, *runs))


def test_an_iterator_of_parameters_is_read_once():
    model = network()
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05, weigh_by=model[2].parameters())
    train(model, optimizer, range(2))
    moments = optimizer.state_dict()["moments"]["exp_avg"]
    assert sorted(moments) == [2, 3]


def test_moments_take_memory_for_the_named_parameters_only():
    model = network()
    optimizer = made(model)
    train(model, optimizer, range(2))
    moments = optimizer.state_dict()["moments"]["exp_avg"]
    assert {position: tuple(values.shape) for position, values in moments.items()} == {0: (2, 4, 3)}


def test_the_weights_are_those_of_a_problem_without_the_others():
    """What is left out of the weighing has no influence on the weights."""
    weights = []
    for factor in (1.0, 1000.0):
        a, b = pair()
        optimizer = UnbiasedMultiGradient([a, b], lr=0.0, weigh_by=[a])

        def objectives(a=a, b=b, factor=factor) -> list[Tensor]:
            return [a.square().sum() + factor * b.sum(), (a - 4).square().sum() - factor * b.sum()]

        for _ in range(3):
            record = optimizer.step(objectives)
        weights.append(record.weights)
    assert torch.equal(*weights)


def test_a_loss_that_reaches_none_of_them_is_refused():
    a, b = pair()
    optimizer = UnbiasedMultiGradient([a, b], lr=0.1, weigh_by=[a])
    with pytest.raises(ValueError, match=r"losses\[1\] reaches none of the parameters in weigh_by"):
        optimizer.backward([a.sum() + b.sum(), 2 * b.sum()])
    assert a.grad is None
    assert optimizer.last is None
    optimizer.backward([a.sum() + b.sum(), 0 * a.sum() + b.sum()])  # a gradient of 0 is one


def test_what_is_not_finite_elsewhere_is_still_refused():
    a, b = pair()
    optimizer = UnbiasedMultiGradient([a, b], lr=0.1, weigh_by=[a])
    with pytest.raises(FloatingPointError, match=r"losses\[1\]|gradient"):
        optimizer.backward([a.sum(), a.sum() + b.sum() * torch.inf])
    skipping = UnbiasedMultiGradient([a, b], lr=0.1, weigh_by=[a], nonfinite="skip")
    skipping.step(lambda: [a.sum(), a.sum() + (0 * b.sum()).sqrt()])  # a gradient of 0 · ∞
    assert skipping.skipped == 1
    assert skipping.state_dict()["moments"] is None


def test_a_scaler_leaves_the_true_gradients_in_the_moments():
    records = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network()
        optimizer = made(model)
        for step in range(2):
            optimizer.zero_grad()
            record = optimizer.backward(losses(model, step), scaler=scaler)
            if scaler is not None:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        records.append([record.gramian, record.norms])
    torch.testing.assert_close(records[0], records[1])


# --- State


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_copies_weigh_by_their_own_parameters(copied):
    model = network()
    optimizer = made(model)
    train(model, optimizer, range(3))
    other_model, other = copied((model, optimizer))
    ours, theirs = train(model, optimizer, range(3, 6)), train(other_model, other, range(3, 6))
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, model.parameters(), other_model.parameters()))
    assert list(other.state_dict()["moments"]["exp_avg"]) == [0]


def test_a_state_dict_resumes_to_the_same_bits():
    model = network()
    optimizer = made(model)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    again = made(resumed)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert all(
        map(torch.equal, train(model, optimizer, range(3, 6)), train(resumed, again, range(3, 6)))
    )
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_micro_batches_are_weighed_by_the_named_parameters_too():
    model, twin = network(), network()
    whole, parts = made(model), made(twin)
    for step in range(3):
        whole.step(lambda step=step: losses(model, step))
        with parts.accumulate():
            parts.backward([loss / 2 for loss in losses(twin, step)])
        parts.backward([loss / 2 for loss in losses(twin, step)])
        parts.step()
    torch.testing.assert_close(parts.last.gramian, whole.last.gramian)
    torch.testing.assert_close([*twin.parameters()], [*model.parameters()])


# --- Wrong use


def test_nothing_to_weigh_by_is_refused():
    with pytest.raises(ValueError, match=r"^weigh_by must hold parameters .*, got none$"):
        UnbiasedMultiGradient(pair(), lr=0.1, weigh_by=[])


def test_what_the_optimizer_does_not_train_is_refused():
    a, b = pair()
    with pytest.raises(ValueError, match=r"weigh_by must hold .* got 1 others"):
        UnbiasedMultiGradient([a], lr=0.1, weigh_by=[a, b])
    with pytest.raises(ValueError, match="got 1 others"):
        UnbiasedMultiGradient([a], lr=0.1, weigh_by=[a.detach().clone()])  # equal, not the same


def test_the_state_of_other_parameters_is_refused_and_changes_nothing():
    model = network()
    by_all = UnbiasedMultiGradient(model.parameters(), torch.optim.Adam, lr=0.05)
    train(model, by_all, range(2))
    optimizer = made(network())
    with pytest.raises(ValueError, match="parameters that are not in weigh_by"):
        optimizer.load_state_dict(by_all.state_dict())
    assert optimizer.state_dict()["moments"] is None
    assert not optimizer.state
