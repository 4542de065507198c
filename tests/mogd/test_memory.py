"""How many large buffers are alive at once."""

import weakref
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mogd import UnbiasedMultiGradient

SHAPE = (2048, 1024)  # 8 MiB, more than the blocks that the moments are updated in


class LargeBuffers(TorchDispatchMode):
    """Counts bytes of the storages of at least ``least`` bytes that are made inside, and live."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.alive: dict[int, tuple[int, weakref.ref]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in given | self.alive.keys():
                self._note(leaf.untyped_storage())
        self.peak = max(self.peak, sum(size for size, _ in self.alive.values()))
        return result

    def _note(self, storage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if size >= self.least:
            gone = weakref.ref(storage, lambda _: self.alive.pop(address))
            self.alive[address] = (size, gone)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def matrices() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(SHAPE)) for _ in range(2)]


def objectives(first: Tensor, second: Tensor):
    """Two losses with small activations; the gradient of each is as large as the parameters."""
    x = torch.ones(SHAPE[1])
    yield (first @ x).square().mean() + (second @ x).square().mean()
    yield (first @ x - 1).square().mean() + (second @ x - 2).square().mean()


def peak_in_gradients(train, least: int) -> float:
    """The largest memory of three steps, in units of all parameters' gradient."""
    with LargeBuffers(least) as buffers:
        for _ in range(3):
            train()
    return buffers.peak / (2 * least)


def peak_of_the_base(parameters: list[nn.Parameter]) -> float:
    bare = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def train() -> None:
        bare.zero_grad()
        for loss in objectives(*parameters):
            loss.backward()
        bare.step()

    return peak_in_gradients(train, parameters[0].nbytes)


@pytest.mark.parametrize("way", ["lazy", "together", "accumulate", "scaler"])
def test_three_gradient_sized_buffers_beyond_the_base(way):
    parameters = matrices()
    without = peak_of_the_base(parameters)
    optimizer = UnbiasedMultiGradient(parameters, lr=0.1, momentum=0.9)
    scaler = GradScaler("cpu", enabled=way == "scaler")

    def train() -> None:
        optimizer.zero_grad()
        if way == "accumulate":
            with optimizer.accumulate():
                optimizer.backward(objectives(*parameters))
        losses = objectives(*parameters)
        optimizer.backward(list(losses) if way == "together" else losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()

    assert 2 <= without <= 3  # gradient, momentum and what autograd adds to the gradient
    # m₁, m₂ and the gradient of one more loss
    assert 2.5 <= peak_in_gradients(train, parameters[0].nbytes) - without <= 3


def activations(weight: Tensor, depth: int) -> Tensor:
    """``depth`` saved activations of 8 MiB."""
    hidden = weight * torch.ones(SHAPE)
    for _ in range(depth):
        hidden = hidden.sin()
    return hidden.mean()


def peak_of_activations(
    *depths: int, together: bool = False, accumulate: bool = False, held: bool = False
) -> float:
    """The largest memory of one ``backward``, in activations; the losses themselves may be held."""
    weight = nn.Parameter(torch.ones(SHAPE[1]))
    optimizer = UnbiasedMultiGradient([weight], rule=lambda gramian: gramian.diagonal())
    kept: list[Tensor] = []

    def losses():
        for depth in depths:
            loss = activations(weight, depth)
            if held:
                kept.append(loss)
            yield loss

    size = weight.nbytes * SHAPE[0]
    with LargeBuffers(size) as buffers, ExitStack() as stack:
        if accumulate:
            stack.enter_context(optimizer.accumulate())
        optimizer.backward(list(losses()) if together else losses())
    return buffers.peak / size


@pytest.mark.parametrize("accumulate", [False, True])
def test_lazy_losses_need_the_activations_of_the_largest(accumulate):
    largest = peak_of_activations(5, accumulate=accumulate)
    assert largest >= 5
    assert peak_of_activations(4, 5, 3, accumulate=accumulate) == largest
    assert peak_of_activations(5, 5, accumulate=accumulate, held=True) == largest
    # a sequence may share its graphs, so all live until the last: the measure sees them
    assert peak_of_activations(4, 5, 3, together=True, accumulate=accumulate) >= 12
