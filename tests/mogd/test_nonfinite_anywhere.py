"""Numbers that explode at any step, in any loss, in half precision and in one process only.

Whatever is trained, a twin that never saw the bad batches ends in the same bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
from chosen import assert_same_bits, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import reports
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from mogd import Fixed, UnbiasedMultiGradient

STEPS = 6
SCALE = 2.0**8
TARGETS = (1.0, -2.0, 0.5)  # of the losses: none can be met with another


class Spoils(torch.autograd.Function):
    """A loss of 0, one entry of whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.shape, ctx.value = weight.shape, value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        gradient = slope.new_zeros(ctx.shape)
        gradient.view(-1)[0] = ctx.value
        return gradient, None


POISONS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "loss nan": lambda loss, model: loss + math.nan,
    "loss inf": lambda loss, model: loss + math.inf,
    "gradient nan": lambda loss, model: loss + Spoils.apply(next(model.parameters()), math.nan),
    "gradient -inf": lambda loss, model: loss + Spoils.apply(next(model.parameters()), -math.inf),
    "both": lambda loss, model: loss * math.inf,
    "overflow": lambda loss, model: loss,  # its examples are at fault
}


class Bad(NamedTuple):
    """What is wrong with a batch."""

    loss: int
    micro_batch: int
    poison: str


class Way(NamedTuple):
    """How to train."""

    nonfinite: str = "skip"
    scaler: bool = False
    half: bool = False
    micro_batches: int = 1
    losses: int = 2
    base: type[torch.optim.Optimizer] = torch.optim.Adam


WAYS = {
    "skip": Way(),
    "raise": Way("raise"),
    "three losses, SGD": Way(losses=3, base=torch.optim.SGD),
    "micro-batches": Way(micro_batches=2),
    "micro-batches, raise": Way("raise", micro_batches=2),
    "scaler": Way("raise", scaler=True),
    "float16": Way(scaler=True, half=True),
    "float16, raise": Way("raise", scaler=True, half=True, losses=3),
    "float16, micro-batches": Way(scaler=True, half=True, micro_batches=2),
}


def losses_of(
    model: nn.Module, way: Way, step: int, micro_batch: int, bad: Bad | None
) -> Iterator[Tensor]:
    """Each with a forward pass of its own, on examples that depend on the process."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    examples = torch.randn(8, 3, generator=generator)
    for index, target in enumerate(TARGETS[: way.losses]):
        spoiled = bad is not None and (bad.loss, bad.micro_batch) == (index, micro_batch)
        x = examples * 1e30 if spoiled and bad.poison == "overflow" else examples
        with torch.autocast("cpu", torch.float16, enabled=way.half):
            loss = (model(x).float() - target * x[:, :2]).square().mean() / way.micro_batches
        yield POISONS[bad.poison](loss, model) if spoiled else loss


def train(
    way: Way,
    bad: Mapping[int, Bad],
    *,
    unseen: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[dict[str, Any], list[str]]:
    """All that a run may change, and the errors of its steps.

    Args:
        way: how to train.
        bad: what is wrong with the batches, by step.
        unseen: whether to leave these batches out.
        wrap: the network for many processes.
    """
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    optimizer = UnbiasedMultiGradient(
        model.parameters(),
        way.base,
        lr=0.05,
        moment_decay=(0.5, 0.8),
        priority=Fixed(1),
        nonfinite=way.nonfinite,
    )
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=way.scaler)
    errors = []
    for step in range(STEPS):
        if unseen and step in bad:
            continue
        optimizer.zero_grad()
        *first, last = (
            losses_of(model, way, step, part, bad.get(step)) for part in range(way.micro_batches)
        )
        try:
            with optimizer.accumulate(), getattr(model, "no_sync", nullcontext)():
                for part in first:
                    optimizer.backward(part, scaler=scaler)
            optimizer.backward(last, scaler=scaler)
        except FloatingPointError as error:
            errors.append(str(error))
        scaler.step(optimizer)
        scaler.update(SCALE if way.scaler else None)  # the twin's, whatever overflowed
    return snapshot(optimizer), errors


def assert_nothing_happened(
    way: Way, bad: Mapping[int, Bad], seen: tuple[Any, ...], unseen: tuple[Any, ...]
) -> None:
    """The bad batches were told or counted, and nothing else came of them."""
    (ours, errors), (twins, none) = seen, unseen
    assert none == []
    if way.nonfinite == "raise" and not way.scaler:
        assert len(errors) == len(bad)
        for error, (_, what) in zip(errors, sorted(bad.items()), strict=True):
            assert error == f"not finite: losses[{what.loss}], or the gradient of it"
        assert ours["skipped"] == 0
    else:
        assert errors == []
        assert ours["skipped"] == len(bad)
    assert_same_bits(ours | {"skipped": 0}, twins)
    assert twins["skipped"] == 0


@settings(max_examples=150)
@given(st.sampled_from(list(WAYS)), st.data())
def test_at_any_step_and_in_any_loss_it_is_as_if_the_batch_had_not_been(name, data):
    way = WAYS[name]
    kinds = st.builds(
        Bad,
        st.integers(0, way.losses - 1),
        st.integers(0, way.micro_batches - 1),
        st.sampled_from(list(POISONS)),
    )
    bad = data.draw(st.dictionaries(st.integers(0, STEPS - 1), kinds, min_size=1, max_size=3))
    assert_nothing_happened(way, bad, train(way, bad), train(way, bad, unseen=True))


# --- In one process of two

BAD = {
    poison: {0: Bad(0, 0, poison), 2: Bad(1, 0, poison), 3: Bad(0, 0, poison)} for poison in POISONS
}


def in_one_process(rank: int, world: int, way: Way, bad: Mapping[int, Bad]) -> list[Any]:
    """What :func:`train` gives where the last process alone has bad batches, and without them."""
    here = bad if rank == world - 1 else {}
    wrap = DistributedDataParallel
    return [train(way, here, wrap=wrap), train(way, bad, unseen=True, wrap=wrap)]


def nan_weights(rank: int, world: int) -> list[Any]:
    """The steps of a rule that gives weights that are not numbers, now and then."""
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False))
    times = []

    def rule(gramian: Tensor) -> Tensor:
        times.append(1)
        return torch.ones(2) if len(times) % 2 else torch.full((2,), torch.nan)

    optimizer = UnbiasedMultiGradient(model.parameters(), rule=rule, nonfinite="skip")
    for _ in range(4):
        optimizer.step(lambda: (model(torch.ones(1, 1)).sum() for _ in range(2)))
    return [optimizer.skipped, int(optimizer.state_dict()["moments"]["count"])]


CHECKS = {
    f"{name}, {poison}": partial(in_one_process, way=WAYS[name], bad=bad)
    for name in WAYS
    for poison, bad in BAD.items()
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes reported."""
    checks = CHECKS | {"nan weights": nan_weights}
    return reports(checks, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", WAYS)
def test_in_one_process_it_counts_in_all_alike(processes, name, poison):
    first, second = (found[f"{name}, {poison}"] for found in processes)
    assert_same_bits(first[0][0], second[0][0])
    assert first[0][1] == second[0][1]
    for found in (first, second):
        assert_nothing_happened(WAYS[name], BAD[poison], *found)


def test_weights_that_are_not_numbers_are_no_disagreement(processes):
    for found in processes:
        assert found["nan weights"] == [2, 2]
