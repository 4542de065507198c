"""Every optimizer of torch.optim as the base."""

import functools
import inspect
import io
import weakref

import pytest
import torch
from torch import Tensor, nn

from mogd import Constant, Fixed, UnbiasedMultiGradient

# SparseAdam wants sparse gradients, which have no Gramian here: see the test of its own below.
BASES = [
    base
    for base in vars(torch.optim).values()
    if inspect.isclass(base)
    and issubclass(base, torch.optim.Optimizer)
    and base not in (torch.optim.Optimizer, torch.optim.SparseAdam)
]
# `capturable` is not among them: torch refuses it for parameters on the CPU.
OPTIONS = [
    (base, option)
    for base in BASES
    for option in ("foreach", "fused", "maximize", "nesterov", "amsgrad")
    if option in inspect.signature(base).parameters
]
SUM = Constant((1.0, 1.0))


def network(seed: int = 0) -> nn.Sequential:
    """Matrices alone, which Muon asks for."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))


def objectives(model: nn.Module, step: int):
    """Two losses of one batch that cannot both be met."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator).to(next(model.parameters()).dtype)
    yield (model(x) - x[:, :2]).square().mean()
    yield (model(x) + 2 * x[:, 1:]).square().mean()


def train(model: nn.Module, optimizer: UnbiasedMultiGradient, steps: range) -> list[Tensor]:
    weights = []
    for step in steps:
        record = optimizer.step(lambda step=step: objectives(model, step))
        assert record is not None
        weights.append(record.weights)
    return weights


def train_bare(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The sum of the losses, as one would write it without mogd."""
    for step in steps:

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            losses = []
            with torch.enable_grad():
                for loss in objectives(model, step):
                    loss.backward()
                    losses.append(loss.detach().double())
            return float(torch.stack(losses).sum())

        optimizer.step(closure)


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin)


def test_bases_are_found():
    assert {torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS, torch.optim.Muon} <= set(BASES)


@pytest.mark.parametrize("base", BASES)
def test_base_trains(base):
    model = network()
    optimizer = UnbiasedMultiGradient(model.parameters(), base, lr=0.01)
    before = sum(loss.item() for loss in objectives(model, 0))
    train(model, optimizer, range(6))
    assert sum(loss.item() for loss in objectives(model, 0)) < before


@pytest.mark.parametrize("base", BASES)
def test_weighted_sum_is_the_bare_base(base):
    model, twin = network(), network()
    optimizer = UnbiasedMultiGradient(model.parameters(), base, rule=SUM, lr=0.01)
    train(model, optimizer, range(3))
    train_bare(twin, base(twin.parameters(), lr=0.01), range(3))
    assert_same_bits(model, twin)


@pytest.mark.parametrize(("base", "option"), OPTIONS)
def test_options_reach_the_base(base, option):
    options = {"lr": 0.01, option: True}
    if base is torch.optim.SGD and option == "nesterov":
        options["momentum"] = 0.9
    model, twin = network(), network()
    train(model, UnbiasedMultiGradient(model.parameters(), base, rule=SUM, **options), range(3))
    train_bare(twin, base(twin.parameters(), **options), range(3))
    assert_same_bits(model, twin)


@pytest.mark.parametrize("base", BASES)
def test_base_resumes_to_the_same_bits(base):
    model = network()
    optimizer = UnbiasedMultiGradient(
        model.parameters(), base, moment_decay=(0.5, 0.8), priority=Fixed(1), lr=0.01
    )
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, optimizer, range(3, 5))

    resumed = network(seed=1)
    again = UnbiasedMultiGradient(resumed.parameters(), base, priority=Fixed(1))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    weights = train(resumed, again, range(3, 5))

    assert all(map(torch.equal, weights, expected))
    assert_same_bits(resumed, model)


@pytest.mark.parametrize(
    "base",
    [
        functools.partial(torch.optim.Adam, betas=(0.8, 0.9)),
        lambda params, lr: torch.optim.Adam(params, lr, betas=(0.8, 0.9)),
    ],
)
def test_base_may_be_any_callable(base):
    model, twin = network(), network()
    optimizer = UnbiasedMultiGradient(model.parameters(), base, rule=SUM, lr=0.01)
    train(model, optimizer, range(3))
    bare = torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.8, 0.9))
    train_bare(twin, bare, range(3))
    assert_same_bits(model, twin)


def test_base_that_makes_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"base must make a torch\.optim\.Optimizer .*, got list"):
        UnbiasedMultiGradient(network().parameters(), list)


def test_base_that_is_no_callable_is_refused():
    with pytest.raises(TypeError, match=r"base must be an optimizer's class, .* got 'adam'"):
        UnbiasedMultiGradient(network().parameters(), "adam")


def test_maximize_ascends():
    point = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = UnbiasedMultiGradient([point], lr=0.5, maximize=True)
    optimizer.step(lambda: [point[0], 4 * point[1]])
    assert point.tolist() == [1.25, 2.0]  # + 0.5 · ½ · (1, 4)


def test_parameter_groups_keep_their_options():
    slow, fast = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    optimizer = UnbiasedMultiGradient(
        [{"params": [slow], "lr": 0.125}, {"params": [fast], "weight_decay": 0.5}], lr=0.25
    )
    optimizer.step(lambda: [slow + fast, 3 * slow + 5 * fast])  # gradients ½(1 + 3), ½(1 + 5)
    assert slow.item() == 1 - 0.125 * 2
    assert fast.item() == 1 - 0.25 * (3 + 0.5 * 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25]


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_lbfgs_sees_one_objective_within_a_step(line_search_fn):
    """The twin minimises Σ κ L + κ_reg L² with the weights that the record names."""
    options = {"lr": 0.1, "max_iter": 5, "line_search_fn": line_search_fn}
    model, twin = network().double(), network().double()
    optimizer = UnbiasedMultiGradient(
        model.parameters(), torch.optim.LBFGS, priority=Fixed(1), **options
    )
    bare = torch.optim.LBFGS(twin.parameters(), **options)
    evaluations, regularized = 0, 0
    for step in range(6):

        def closure(step: int = step):
            nonlocal evaluations
            evaluations += 1
            return objectives(model, step)

        record = optimizer.step(closure)
        regularized += int((record.regularization > 0).any())

        def objective(step: int = step, record=record) -> Tensor:
            bare.zero_grad()
            losses = torch.stack(list(objectives(twin, step)))
            value = (record.weights * losses + record.regularization * losses**2).sum()
            value.backward()
            return value

        bare.step(objective)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-9, atol=1e-11)
    assert regularized > 0
    assert evaluations > 6
    assert optimizer.state_dict()["moments"]["count"] == 6  # once a step, however often it looks


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.LBFGS])
def test_gradients_that_a_closure_leaves_are_dropped(base):
    ends = []
    for attacks in (False, True):
        model = network()
        optimizer = UnbiasedMultiGradient(model.parameters(), base, lr=0.1)

        def closure(model=model, attacks=attacks):
            if attacks:
                sum(objectives(model, 1)).backward()
            return objectives(model, 0)

        for _ in range(2):
            optimizer.step(closure)
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*ends)


def test_lbfgs_without_closure_is_refused():
    model = network()
    optimizer = UnbiasedMultiGradient(model.parameters(), torch.optim.LBFGS)
    optimizer.backward(objectives(model, 0))
    with pytest.raises(TypeError, match=r"LBFGS .* closure that returns them"):
        optimizer.step()


def test_sparse_adam_has_no_use_here():
    """Sparse gradients are refused by us, dense ones by SparseAdam."""
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = UnbiasedMultiGradient(embedding.parameters(), torch.optim.SparseAdam)
    token = torch.tensor([1])
    with pytest.raises(ValueError, match=r"losses\[0\] .*sparse"):
        optimizer.backward([embedding(token).sum(), embedding(token).square().sum()])
    optimizer.backward([embedding.weight.sum(), embedding.weight.square().sum()])
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()


def test_lbfgs_is_refused_micro_batches_within_its_closure():
    model = network()
    optimizer = UnbiasedMultiGradient(model.parameters(), torch.optim.LBFGS)

    def closure():
        with optimizer.accumulate():
            optimizer.backward(objectives(model, 0))
        return objectives(model, 1)

    with pytest.raises(TypeError, match=r"LBFGS evaluates .* must return those of the whole batch"):
        optimizer.step(closure)
    assert optimizer.last is None
    optimizer.step(lambda: objectives(model, 0))  # nothing is left of them


@pytest.mark.parametrize(("later", "got"), [(1, "1"), (3, "more")])
def test_lbfgs_is_refused_another_number_of_losses_at_a_later_evaluation(later, got):
    model = network()
    optimizer = UnbiasedMultiGradient(model.parameters(), torch.optim.LBFGS, lr=0.1)
    numbers = iter([2, later])

    def closure():
        losses = list(objectives(model, 0)) * 2
        return losses[: next(numbers)]

    with pytest.raises(ValueError, match=f"closure must return 2 losses as before, got {got}"):
        optimizer.step(closure)


class Perturbed(torch.optim.Optimizer):
    """Steps along the gradient at p + 1, as SAM does at a point near p."""

    def __init__(self, params, lr: float, clear: bool) -> None:
        super().__init__(params, {"lr": lr, "clear": clear})

    @torch.no_grad()
    def step(self, closure) -> float:
        (group,) = self.param_groups
        (p,) = group["params"]
        if group["clear"]:
            p.grad = None
        else:
            p.add_(1.0)
        value = closure()
        if not group["clear"]:
            p.sub_(1.0)
        p.sub_(group["lr"] * p.grad)
        return value


@pytest.mark.parametrize(("clear", "gradient"), [(False, 8.0), (True, 4.0)])
def test_a_base_that_moves_before_its_first_evaluation_has_it_where_it_went(clear, gradient):
    p = nn.Parameter(torch.ones(1))
    optimizer = UnbiasedMultiGradient(
        [p], Perturbed, rule=Constant((1.0, 1.0)), lr=0.1, clear=clear
    )
    optimizer.step(lambda: [p.square().sum(), p.square().sum()])
    torch.testing.assert_close(p, torch.tensor([1 - 0.1 * gradient]))


def test_lbfgs_evaluates_once_where_it_starts():
    p, calls = nn.Parameter(torch.ones(1)), []
    optimizer = UnbiasedMultiGradient([p], torch.optim.LBFGS, max_iter=1)

    def closure() -> list[Tensor]:
        calls.append(p.item())
        return [p.square().sum(), (p - 3).square().sum()]

    for _ in range(2):
        optimizer.step(closure)
    assert len(calls) == 2


def test_the_first_gradient_is_not_kept_for_the_whole_step():
    p, alive = nn.Parameter(torch.ones(1)), []

    class Watched(torch.optim.LBFGS):
        def step(self, closure):
            gradient = weakref.ref(p.grad)

            def watched() -> float:
                value = closure()
                alive.append(gradient() is not None)
                return value

            return super().step(watched)

    optimizer = UnbiasedMultiGradient([p], Watched, max_iter=3, lr=0.1)
    optimizer.step(lambda: [p.square().sum(), (p - 3).square().sum()])
    assert alive[0]
    assert not any(alive[1:])


def test_a_gradient_that_a_hook_of_the_base_has_clipped_is_taken_so():
    p, calls = nn.Parameter(torch.full((1,), 100.0)), []
    optimizer = UnbiasedMultiGradient(
        [p], torch.optim.LBFGS, rule=Constant((1.0, 1.0)), lr=1.0, max_iter=1
    )
    optimizer.base.register_step_pre_hook(lambda *_: p.grad.clamp_(max=1.0) and None)

    def closure() -> list[Tensor]:
        calls.append(p.item())
        return [p.square().sum(), p.square().sum()]

    optimizer.step(closure)
    assert calls == [100.0]
    assert p.item() == 99.0
