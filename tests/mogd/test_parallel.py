"""Several processes and one model: DistributedDataParallel over gloo.

Each process runs all of ``CHECKS``; the tests then look at what it reported.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed
from processes import reports
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mogd import Threshold, UnbiasedMultiGradient, parallel

STEPS = 8
BATCH = 24  # in all processes together

Objectives = Callable[[nn.Module, Tensor], Iterator[Tensor]]


class Network(nn.Module):
    """Two heads, so that a loss may leave a parameter unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        self.double()

    def forward(self, x: Tensor, heads: tuple[int, ...] = (0, 1)) -> Tensor:
        hidden = self.body(x).tanh()
        return torch.stack([self.heads[head](hidden) for head in heads]).sum(0)


def batch(step: int, rank: int, world: int) -> Tensor:
    """The part of a process of the examples of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, dtype=torch.float64, generator=generator)[rank::world]


def objectives(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Two losses that cannot both be met, each with a forward pass of its own."""
    yield (model(x) - x[:, :2]).square().mean()
    yield (model(x) + 2 * x[:, :2]).square().mean()


def unused(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield (model(x, (0,)) - x[:, :2]).square().mean()
    yield (model(x, (1,)) + 2 * x[:, :2]).square().mean()


def train(
    rank: int,
    world: int,
    *,
    make: Callable[[], nn.Module] = Network,
    wrap: Callable[..., nn.Module] = lambda model: model,
    groups: Callable[[nn.Module], Any] = nn.Module.parameters,
    losses: Objectives = objectives,
    micro_batches: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Train one model; the priority measures something that differs between processes."""
    network = make()
    model = wrap(network)
    seen = torch.zeros(())
    oracle = Threshold(lambda _: parallel.average(seen), limit=0.0)
    optimizer = UnbiasedMultiGradient(
        groups(model), moment_decay=(0.5, 0.8), priority=oracle, **{"lr": 0.05} | options
    )
    records = []
    for step in range(STEPS):
        examples = batch(step, rank, world)
        seen = examples.mean()
        if micro_batches == 1:
            record = optimizer.step(lambda examples=examples: losses(model, examples))
        else:
            optimizer.zero_grad()
            *first, last = examples.chunk(micro_batches)
            with optimizer.accumulate(), getattr(model, "no_sync", nullcontext)():
                for part in first:
                    optimizer.backward(loss / micro_batches for loss in losses(model, part))
            record = optimizer.backward(loss / micro_batches for loss in losses(model, last))
            optimizer.step()
        assert record is not None
        records.append(record)
    return {
        "parameters": [whole(parameter) for parameter in network.parameters()],
        "losses": [record.losses for record in records],
        "weights": [record.weights for record in records],
        "prioritized": [record.prioritized for record in records],
        "regularization": [record.regularization for record in records],
        "conflict": [record.conflict for record in records],
    }


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would hold it."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached.clone()


WAYS: dict[str, dict[str, Any]] = {
    "lazy": {"wrap": DistributedDataParallel},
    "bucket view": {"wrap": partial(DistributedDataParallel, gradient_as_bucket_view=True)},
    "unused": {
        "wrap": partial(DistributedDataParallel, find_unused_parameters=True),
        "losses": unused,
    },
    "accumulate": {"wrap": DistributedDataParallel, "micro_batches": 2},
    "accumulate in bucket views": {
        "wrap": partial(DistributedDataParallel, gradient_as_bucket_view=True),
        "micro_batches": 2,
    },
    "Adam": {"wrap": DistributedDataParallel, "base": torch.optim.Adam},
    "L-BFGS": {
        "wrap": DistributedDataParallel,
        "base": torch.optim.LBFGS,
        "max_iter": 4,
        "line_search_fn": "strong_wolfe",
    },
}


def refused(
    rank: int, world: int, losses: Callable, *, then: Callable = objectives, **options: Any
) -> dict[str, Any]:
    """The error of a step after a good one, and whether it changed anything."""
    model = DistributedDataParallel(Network())
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05, **options)
    optimizer.step(lambda: then(model, batch(0, rank, world)))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    count = optimizer.state_dict()["moments"]["count"].clone()
    try:
        optimizer.step(lambda: losses(model, batch(1, rank, world)))
    except (RuntimeError, FloatingPointError) as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    unchanged = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    return {
        "message": message,
        "unchanged": all(unchanged) and count == optimizer.state_dict()["moments"]["count"],
        "skipped": optimizer.skipped,
    }


def one_forward(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [(y - x[:, :2]).square().mean(), (y + 2 * x[:, :2]).square().mean()]


def forwards_first(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(objectives(model, x))


def around_the_wrapper(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield from objectives(model.module, x)


def second_around_the_wrapper(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield next(objectives(model, x))
    yield (model.module(x) + 2 * x[:, :2]).square().mean()


def without_sync(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    with model.no_sync():
        yield from objectives(model, x)


def broken_on_rank_1(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    second = torch.inf if torch.distributed.get_rank() == 1 else 1.0
    for loss, factor in zip(objectives(model, x), (1.0, second), strict=True):
        yield loss * factor


def infinite_around_the_wrapper(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The losses are finite, a gradient of one process is not."""
    for loss in objectives(model.module, x):
        weight = next(model.parameters())
        broken = (weight - weight.detach()).sum().sqrt()
        yield loss + broken if torch.distributed.get_rank() == 1 else loss


UNAVERAGED = {
    "infinite around the wrapper": (infinite_around_the_wrapper, 0),
    "one forward": (one_forward, 1),
    "forwards first": (forwards_first, 1),
    "around the wrapper": (around_the_wrapper, 0),
    "second around the wrapper": (second_around_the_wrapper, 1),
    "without sync": (without_sync, 0),
}


def priority_of_its_own(rank: int, world: int) -> list[str]:
    """The outcome of each of four steps when every process favours another loss."""
    model = DistributedDataParallel(Network())
    optimizer = UnbiasedMultiGradient(
        model.parameters(), moment_decay=(0.0, 0.0), priority=lambda _: rank % 2, lr=1e-3
    )
    x = torch.ones(4, 3, dtype=torch.float64)
    outcomes = []
    for _ in range(3):
        try:
            optimizer.step(lambda: (factor * model(x).sum() for factor in (1, -2)))
            outcomes.append("done")
        except RuntimeError as error:
            outcomes.append(str(error))
    return outcomes


def independent(rank: int, world: int) -> int:
    """A model for each process, which makes as many steps as it likes."""
    model = Network()
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05)
    optimizer.distributed = False
    for step in range(2 + rank):
        optimizer.step(lambda step=step: objectives(model, batch(step, rank, world)))
    return int(optimizer.state_dict()["moments"]["count"])


def loaded(rank: int, world: int) -> list[float]:
    """The weights after a state that all have loaded, whatever each did before."""
    p = nn.Parameter(torch.ones(2))
    three = [lambda: p.sum(), lambda: 2 * p[0], lambda: p.square().sum()]

    def made(steps: int, losses: int) -> UnbiasedMultiGradient:
        optimizer = UnbiasedMultiGradient([p], lr=0.0)
        optimizer.distributed = False
        for _ in range(steps):
            optimizer.step(lambda: [loss() for loss in three[:losses]])
        optimizer.distributed = True
        return optimizer

    optimizer = made(steps=2 * rank, losses=2)
    optimizer.load_state_dict(made(steps=3, losses=3).state_dict())
    record = optimizer.step(lambda: [loss() for loss in three])
    assert record is not None
    return record.weights.tolist()


class HeadsApart(Network):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        hidden = self.body(x).tanh()
        return [head(hidden) for head in self.heads]


def heads_of_one_forward(rank: int, world: int) -> str:
    model = DistributedDataParallel(HeadsApart())
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05)
    try:
        optimizer.backward([y.square().mean() for y in model(batch(0, rank, world))])
    except RuntimeError as error:
        return str(error)
    return "no error"


class Twice(nn.Module):
    """A layer used twice, each time under a checkpoint that differentiates it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        once = checkpoint(self.layer, self.other(x), use_reentrant=True)
        return checkpoint(self.layer, once, use_reentrant=True)


def used_twice(rank: int, world: int) -> str:
    model = DistributedDataParallel(Twice(), find_unused_parameters=True)
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05)
    x = batch(0, rank, world)
    try:
        optimizer.backward(model(x).mean() for _ in range(2))
    except RuntimeError as error:
        return str(error)
    return "no error"


def unwrapped(rank: int, world: int) -> str:
    """A model for each process without saying so."""
    model = Network()
    optimizer = UnbiasedMultiGradient(model.parameters())
    try:
        optimizer.backward(objectives(model, batch(0, rank, world)))
    except RuntimeError as error:
        return str(error)
    return "no error"


def overflow(rank: int, world: int) -> dict[str, Any]:
    """A scaled gradient that overflows in one process only."""
    model = DistributedDataParallel(Network())
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05)
    scaler = GradScaler("cpu", init_scale=2.0**4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    factor = 1e308 if rank == 1 else 1.0
    optimizer.backward(
        (loss * factor for loss in objectives(model, batch(0, rank, world))), scaler=scaler
    )
    scaler.step(optimizer)
    scaler.update()
    unchanged = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    return {
        "unchanged": all(unchanged),
        "skipped": optimizer.skipped,
        "scale": scaler.get_scale(),
    }


def another_number(rank: int, world: int, *, sequence: bool, steps: int) -> dict[str, Any]:
    """The error where the last process has a loss more, and what it costs: nothing."""
    point = nn.Parameter(torch.ones(2))
    optimizer = UnbiasedMultiGradient([point], lr=0.05)
    kind = list if sequence else iter
    backwards = []

    def losses(number: int) -> Any:
        return kind([(point**power).sum() for power in range(1, number + 1)])

    for _ in range(steps):
        optimizer.step(lambda: losses(2))
    before = point.detach().clone()
    point.register_hook(lambda gradient: backwards.append(1))
    try:
        optimizer.step(lambda: losses(2 + (rank == world - 1)))
    except ValueError as error:
        message = str(error)
    else:
        message = "no error"
    unchanged = torch.equal(point, before) and point.grad is None
    found = {"message": message, "unchanged": unchanged, "passes": len(backwards)}
    optimizer.step(lambda: losses(2))  # all go on together
    return found


def default_device(rank: int, world: int) -> bool:
    """The number of losses goes by the CPU, wherever tensors are made by default."""
    with torch.device("meta"):
        parallel.agree_on_number(2)
    return True


def average(rank: int, world: int) -> tuple[int, Tensor, bool]:
    value = torch.tensor([0.1, 3.0]) * (rank + 1)
    given = value.clone()
    return parallel.world_size(), parallel.average(value), torch.equal(value, given)


NUMBERS = [("list", True, 0), ("list", True, 2), ("iterator", False, 0)]

CHECKS: dict[str, Callable[[int, int], Any]] = {
    **{f"train {way}": partial(train, **options) for way, options in WAYS.items()},
    **{name: partial(refused, losses=losses) for name, (losses, _) in UNAVERAGED.items()},
    "broken, raise": partial(refused, losses=broken_on_rank_1),
    "broken, skip": partial(refused, losses=broken_on_rank_1, nonfinite="skip"),
    "priority of its own": priority_of_its_own,
    "independent": independent,
    "loaded": loaded,
    "unwrapped": unwrapped,
    "heads of one forward": heads_of_one_forward,
    "used twice": used_twice,
    "overflow": overflow,
    "average": average,
    "default device": default_device,
    **{
        f"another number, {name}, {steps}": partial(another_number, sequence=sequence, steps=steps)
        for name, sequence, steps in NUMBERS
    },
}


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of 2, or 3, processes reported."""
    return reports(CHECKS, request.param, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("way", WAYS)
def test_processes_together_are_one_on_the_joined_batch(processes, way):
    options = {name: WAYS[way][name] for name in WAYS[way].keys() - {"wrap", "micro_batches"}}
    alone = train(0, 1, **options)
    # the oracle was of two minds, and κ_reg was at work
    assert {int(index) for index in alone["prioritized"]} == {0, 1}
    assert torch.stack(alone["regularization"]).any()
    for found in processes:
        torch.testing.assert_close(found[f"train {way}"], alone, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_processes_agree_to_the_bit(processes, way):
    first, *others = (found[f"train {way}"] for found in processes)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("pattern", UNAVERAGED)
def test_gradients_that_were_not_averaged_are_refused(processes, pattern):
    _, index = UNAVERAGED[pattern]
    for found in processes:
        assert (
            f"RuntimeError: the processes hold different gradients of losses[{index}]"
            in (found[pattern]["message"])
        )
        assert "give backward() a generator" in found[pattern]["message"]
        assert found[pattern]["unchanged"]


def test_a_loss_for_each_output_of_one_forward_pass_is_told_what_to_do(processes):
    for found in processes:
        message = found["heads of one forward"]
        assert message.startswith("losses[1] has parameters that DistributedDataParallel has av")
        assert "give backward() a generator" in message


def test_what_torch_says_of_the_first_loss_is_not_said_of_a_loss_before_it(processes):
    for found in processes:
        assert "ready only once" in found["used twice"]
        assert "losses[0]" not in found["used twice"]


def test_what_is_not_finite_in_one_process_counts_in_all(processes):
    for found in processes:
        assert found["broken, raise"]["message"].startswith("FloatingPointError: not finite: ")
        assert "losses[1]" in found["broken, raise"]["message"]
        assert found["broken, raise"]["unchanged"]
        assert found["broken, skip"] == {"message": "no error", "unchanged": True, "skipped": 1}
        assert found["overflow"] == {"unchanged": True, "skipped": 1, "scale": 2.0**3}


def test_priority_of_one_process_alone_is_refused_at_the_next_step(processes):
    for found in processes:
        first, second, third = found["priority of its own"]
        assert (first, second) == ("done", "done")  # nothing to favour yet; then they disagree
        assert "the processes weighed the losses differently" in third
        assert "mogd.parallel.average" in third


def test_independent_models_are_allowed_when_said(processes):
    assert [found["independent"] for found in processes] == [2, 3, 4][: len(processes)]
    for found in processes:
        assert "set optimizer.distributed = False" in found["unwrapped"]


def test_what_a_process_did_before_all_loaded_a_state_does_not_count(processes):
    first, *others = (found["loaded"] for found in processes)
    assert len(first) == 3
    assert others == [first] * len(others)


@pytest.mark.parametrize(("name", "sequence", "steps"), NUMBERS)
def test_another_number_of_losses_in_one_process_is_refused_in_all(
    processes, name, sequence, steps
):
    numbers = [2] * (len(processes) - 1) + [3]
    for found in processes:
        outcome = found[f"another number, {name}, {steps}"]
        assert outcome["message"] == (
            f"losses must be as many in each process, got {numbers} by rank"
        )
        assert outcome["unchanged"]
        assert (outcome["passes"] == 0) == sequence  # known before the first backward pass


def test_the_number_of_losses_is_told_on_the_cpu(processes):
    assert all(found["default device"] for found in processes)


def test_average(processes):
    world = len(processes)
    for size, mean, untouched in (found["average"] for found in processes):
        assert size == world
        assert untouched
        assert torch.equal(mean, processes[0]["average"][1])
        torch.testing.assert_close(mean, torch.tensor([0.1, 3.0]) * (world + 1) / 2)


def test_average_in_one_process_is_the_value():
    value = torch.tensor([1.0, 2.0])
    assert parallel.world_size() == 1
    assert parallel.average(value) is value
