"""Parameters sharded over processes by ``fully_shard``, over gloo.

Each process runs all of ``CHECKS``; the tests then look at what it reported.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
import torch.distributed
from processes import reports
from test_parallel import batch, forwards_first, objectives, one_forward, train, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from mogd import UnbiasedMultiGradient, parallel
from mogd.packs import norm
from mogd.shards import is_divided_as, is_dtensor, local, stacked


class Network(nn.Module):
    """Of 1, 2 and 3 rows too: shards are uneven, and some processes hold nothing of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift = nn.Parameter(torch.zeros(3))
        self.body = nn.Linear(3, 8)
        self.head = nn.Linear(8, 2)
        self.factor = nn.Parameter(torch.ones(1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.head(self.body(x + self.shift).tanh())


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    return fully_shard(model, **options)


def nested(model: nn.Module) -> nn.Module:
    for part in (model.body, model.head):
        fully_shard(part)
    return fully_shard(model)


def by_columns(model: nn.Module) -> nn.Module:
    matrix = model.head.weight
    return fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p is matrix else None)


def mixed(model: nn.Module) -> nn.Module:
    """Some parameters whole in each process, which averages their gradients."""
    plain = {model.factor, model.head.weight}
    for parameter in plain:
        parameter.register_hook(parallel.average)
    return fully_shard(model, ignored_params=plain)


def plain_apart(model: nn.Module) -> list[dict[str, Any]]:
    """Groups of sharded and of whole parameters; torch's fast kernels take no lists of both."""
    parameters = list(model.parameters())
    plain = [parameter for parameter in parameters if not is_dtensor(parameter)]
    return [{"params": [p for p in parameters if is_dtensor(p)]}, {"params": plain}]


def hybrid(model: nn.Module) -> nn.Module:
    """Two replicas, each sharded over half of the processes."""
    shape = 2, torch.distributed.get_world_size() // 2
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    return fully_shard(model, mesh=mesh)


def agreeing(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield (model(x) - x[:, :2]).square().mean()
    yield (model(x) - x[:, :2]).abs().mean()


NOT_ALONE = {"wrap", "groups", "micro_batches"}

WAYS: dict[str, dict[str, Any]] = {
    "root": {"wrap": sharded},
    "nested": {"wrap": nested},
    "by columns": {"wrap": by_columns},
    "mixed": {"wrap": mixed},
    "hybrid": {"wrap": hybrid},
    "agreeing": {"wrap": nested, "losses": agreeing},
    "agreeing, mixed": {"wrap": mixed, "losses": agreeing},
    "one forward": {"wrap": nested, "losses": one_forward},
    "forwards first": {"wrap": nested, "losses": forwards_first},
    "accumulate": {"wrap": nested, "micro_batches": 2},
    "Adam": {"wrap": nested, "base": torch.optim.Adam},
    "Adam, mixed": {
        "wrap": mixed,
        "groups": plain_apart,
        "base": torch.optim.Adam,
        "foreach": True,
    },
}


def clipped(rank: int, world: int, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """The norm that clipping finds, and what it leaves."""
    model = wrap(Network())
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05)
    optimizer.backward(objectives(model, batch(0, rank, world)))
    length = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return {"length": whole(length), "left": [whole(p.grad) for p in model.parameters()]}


def another_number(rank: int, world: int) -> list[str]:
    """The error where the first process drops a loss, after the forward pass that all share."""
    model = nested(Network())
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05)
    outcomes = []
    for step in range(4):
        losses = one_forward(model, batch(step, rank, world))
        try:
            number = 1 if rank == 0 and step % 2 == 0 else 2
            optimizer.step(lambda losses=losses, number=number: losses[:number])
            outcomes.append("done")
        except ValueError as error:
            outcomes.append(str(error))
    return outcomes


def shorter_iterator(rank: int, world: int) -> str:
    """The error where the last process runs out of losses, and the others wait for its shards."""
    model = nested(Network())
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05)
    optimizer.step(lambda: objectives(model, batch(0, rank, world)))
    number = 1 if rank == world - 1 else 2
    try:
        optimizer.step(lambda: islice(objectives(model, batch(1, rank, world)), number))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def sums(rank: int, world: int) -> dict[str, Tensor]:
    """Norms of gradients placed in many ways, each of whose squares adds up to 14."""
    mesh = init_device_mesh("cpu", (world // 2, 2))
    entries = torch.tensor([1.0, 2.0, 3.0])
    ways = {
        "replicated": (Replicate(), Replicate()),
        "sharded once": (Replicate(), Shard(0)),
        "sharded the other way": (Shard(0), Replicate()),
        "sharded twice": (Shard(0), Shard(0)),
    }
    placed = {way: distribute_tensor(entries, mesh, placements) for way, placements in ways.items()}
    cpu = torch.device("cpu")
    found = {way: norm({tensor: tensor}, cpu) for way, tensor in placed.items()}
    together = {tensor: tensor for tensor in (*placed.values(), entries)}
    return found | {"together": norm(together, cpu)}


def partial_gradient(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """A replicated parameter whose gradient is left as one summand in each process."""
    mesh = init_device_mesh("cpu", (world,))
    weight = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    x = distribute_tensor(torch.arange(2.0 * world).view(world, 2), mesh, [Shard(0)])
    (x * weight).sum().backward()
    assert weight.grad.placements == (Partial(),)
    optimizer = UnbiasedMultiGradient([weight], rule=lambda gramian: torch.ones(1))
    optimizer.backward([(x * weight).sum().full_tensor()])
    after = optimizer.state_dict()["moments"]["norms"] / (1 - optimizer.moment_decay[1])
    assert weight.grad.placements == (Replicate(),)
    return weight.grad.to_local(), after


def stacks(rank: int, world: int) -> dict[str, bool]:
    """Whether a stack of two parameters, made of the rows at hand, is the stack of the wholes."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    entries = torch.arange(15.0).view(5, 3)
    model = nn.Linear(3, 5, bias=False)
    model.weight = nn.Parameter(distribute_tensor(entries, mesh["tensor"], [Shard(0)]))
    made = {
        "rows": distribute_tensor(entries, mesh, [Replicate(), Shard(0)]),
        "columns": distribute_tensor(entries, mesh, [Shard(0), Shard(1)]),
        "complex": distribute_tensor(entries + 2j, mesh, [Replicate(), Shard(1)]),
        "after tensor parallelism": fully_shard(model, mesh=mesh["data"]).weight,
    }
    same = {}
    for way, parameter in made.items():
        here = local(parameter).detach()
        reals = torch.view_as_real(here) if here.is_complex() else here
        stack = stacked(torch.stack([reals.flatten(), 2 * reals.flatten()]), parameter)
        plain = whole(parameter)
        reals = torch.view_as_real(plain) if plain.is_complex() else plain
        assert is_divided_as(stack, parameter)
        same[way] = torch.equal(whole(stack), torch.stack([reals, 2 * reals]))
    assert not is_divided_as(stack, made["complex"])
    return same


CHECKS: dict[str, Callable[[int, int], Any]] = {
    **{f"train {way}": partial(train, make=Network, **options) for way, options in WAYS.items()},
    **{f"clip {wrap.__name__}": partial(clipped, wrap=wrap) for wrap in (nested, hybrid)},
    "another number": another_number,
    "sums": sums,
    "partial gradient": partial_gradient,
    "stacks": stacks,
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of 2, or 4, processes reported."""
    return reports(CHECKS, request.param, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("way", WAYS)
def test_sharded_training_is_that_of_one_process(processes, way):
    options = {name: WAYS[way][name] for name in WAYS[way].keys() - NOT_ALONE}
    alone = train(0, 1, make=Network, **options)
    conflicts = {bool(conflict) for conflict in alone["conflict"][1:]}
    assert conflicts == {"agreeing" not in way}
    for found in processes:
        torch.testing.assert_close(found[f"train {way}"], alone, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_processes_agree_to_the_bit(processes, way):
    first, *others = (found[f"train {way}"] for found in processes)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("wrap", [nested, hybrid])
def test_clipping_sees_the_whole_gradient(processes, wrap):
    alone = clipped(0, 1, lambda model: model)
    for found in processes:
        torch.testing.assert_close(found[f"clip {wrap.__name__}"], alone)


def test_another_number_of_losses_in_one_process_is_refused_in_all(processes):
    """Before a backward pass that the others would wait for."""
    numbers = [1] + [2] * (len(processes) - 1)
    message = f"losses must be as many in each process, got {numbers} by rank"
    for found in processes:
        assert found["another number"] == [message, "done"] * 2


def test_an_iterator_that_ends_before_the_others_names_what_is_wrong_and_nobody_waits(tmp_path):
    """Once the number is known; its process leaves, and so its connections are closed."""
    *others, last = reports({"found": shorter_iterator}, 2, tmp_path)
    assert last["found"].startswith("ValueError: losses must be 2 as before")
    assert all(other["found"].startswith("RuntimeError: ") for other in others)


def test_each_entry_is_counted_once(processes):
    for found in processes:
        together = found["sums"].pop("together")
        torch.testing.assert_close(together, torch.tensor(5 * 14.0).double().sqrt())
        for length in found["sums"].values():
            torch.testing.assert_close(length, torch.tensor(14.0).double().sqrt())


def test_a_gradient_that_is_still_to_be_added_up_is(processes):
    world = len(processes)
    expected = torch.arange(2.0 * world).view(world, 2).sum(0)
    for found in processes:
        gradient, length = found["partial gradient"]
        assert torch.equal(gradient, expected)
        torch.testing.assert_close(length, expected.norm().double()[None])


def test_moments_are_sharded_as_their_parameters(processes):
    for found in processes:
        assert set(found["stacks"].values()) == {True}
