"""``torch.compile``: of the losses, of the base's step, and around a whole step.

The compiler proper takes tens of seconds on a CPU; where it is enough to know what was given to it,
a stand-in takes note of that and runs it as it is.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mogd import UnbiasedMultiGradient

STEPS = 4


class Noted:
    """A compiler that notes what it is given, and changes nothing."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs.append(graph)
        return graph.forward

    def sees(self, operation: object) -> bool:
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return any(operation in (node.target, str(node.target)) for node in nodes)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def first(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2]).square().mean()


def second(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) + 2 * x[:, :2]).abs().mean()


def both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    return (y - x[:, :2]).square().mean(), (y + 2 * x[:, :2]).abs().mean()


def trained(make_step: Callable, **options) -> list[Tensor]:
    """The parameters after some steps made by ``make_step(model, optimizer)``."""
    torch._dynamo.reset()
    model = network()
    optimizer = UnbiasedMultiGradient(model.parameters(), torch.optim.Adam, lr=0.05, **options)
    step = make_step(model, optimizer)
    for seed in range(STEPS):
        torch.manual_seed(seed)
        step(torch.randn(8, 3))
    assert optimizer.state_dict()["moments"]["count"] == STEPS
    return list(model.parameters())


def explicit(model: nn.Module, optimizer: UnbiasedMultiGradient) -> Callable:
    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        record = optimizer.backward(both(model, x))
        optimizer.step()
        return record.losses

    return step


def in_micro_batches(model: nn.Module, optimizer: UnbiasedMultiGradient) -> Callable:
    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward(both(model, x[:4]))
        record = optimizer.backward(both(model, x[4:]))
        optimizer.step()
        return record.losses

    return step


@pytest.mark.parametrize("make_step", [explicit, in_micro_batches])
def test_a_compiled_function_may_hold_a_whole_step(make_step):
    """The losses are compiled, the optimizer runs as it is; to the same bits here."""
    noted = Noted()
    found = trained(lambda *both: torch.compile(make_step(*both), backend=noted))
    assert noted.sees("tanh") or noted.sees(torch.tanh)
    torch.testing.assert_close(found, trained(make_step), rtol=0.0, atol=0.0)


def test_a_whole_step_is_no_one_graph():
    def full(*of):
        return torch.compile(explicit(*of), backend=Noted(), fullgraph=True)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        trained(full)


def test_losses_made_inside_the_optimizer_are_compiled_if_they_are_themselves():
    noted = Noted()
    compiled = [torch.compile(loss, backend=noted) for loss in (first, second)]

    def lazy(*losses):
        return lambda model, optimizer: (
            lambda x: optimizer.step(lambda: (loss(model, x) for loss in losses))
        )

    found = trained(lazy(*compiled))
    assert len(noted.graphs) == 2
    torch.testing.assert_close(found, trained(lazy(first, second)), rtol=0.0, atol=0.0)


def test_the_step_of_the_base_may_be_compiled():
    noted = Noted()

    def compiled(model, optimizer):
        optimizer.base.step = torch.compile(optimizer.base.step, backend=noted)
        return explicit(model, optimizer)

    found = trained(compiled, foreach=True)
    assert noted.graphs
    torch.testing.assert_close(found, trained(explicit, foreach=True))


@pytest.mark.parametrize("before", ["a pass of one's own", "an iterator"])
def test_a_graph_compiled_for_one_pass_is_refused_with_what_to_do(before):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(4, 3)
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager")
    if before == "an iterator":
        optimizer.backward(loss(compiled, x) for loss in (first, second))
    else:
        first(compiled, x).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"losses\[0\] .* one backward pass alone.* an iterator"):
        optimizer.backward(list(both(compiled, x)))
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.backward(loss(compiled, x) for loss in (first, second))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_losses_by_the_compiler_proper(shared):
    def make_step(compiled, model, optimizer):
        losses = [compiled(both)] if shared else [compiled(first), compiled(second)]

        def lazy(x):
            return losses[0](model, x) if shared else (loss(model, x) for loss in losses)

        return lambda x: optimizer.step(lambda: lazy(x))

    def of(compiled):
        return trained(lambda *given: make_step(compiled, *given))

    compiled = of(lambda function: torch.compile(function, fullgraph=True))
    torch.testing.assert_close(compiled, of(lambda function: function), rtol=1e-4, atol=1e-5)
