"""No waiting for the GPU, checked without one.

Fake CUDA tensors have no values, so whatever reads one raises. The fused Adam kernel has a fake
implementation; autograd has none without a driver, so a stand-in leaves the gradients of a loss,
and all that mogd does before and after it is real.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mogd import BisectorProjection, Constant, Fixed, Threshold, UnbiasedMultiGradient

RULES = [BisectorProjection(), Constant((1.0, 2.0)), lambda gramian: gramian.diagonal()]
PRIORITIES = [Fixed(1), Threshold(lambda losses: losses[0], 1.0)]


class Waits(TorchDispatchMode):
    """Notes what makes the host wait: reading a value, and copying between it and the device.

    Everything is said to be finite, for the reader to go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].is_cuda:
                self.found.append("read")
            return True
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {tensor.device.type for tensor in (*tensors, result)}
            if devices == {"cpu", "cuda"}:
                self.found.append("copy")
        return result


@pytest.fixture
def parameters(monkeypatch):
    """Fake parameters on a fake GPU."""
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(3, 2, device="cuda")) for _ in range(2)]
        leave_gradients(monkeypatch, parameters)
        yield parameters


@pytest.fixture
def shards(monkeypatch):
    """Fake parameters sharded over two fake GPUs, in a group that communicates with nobody."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    mesh = DeviceMesh("cuda", [0, 1])
    with FakeTensorMode():
        parts = [torch.empty(3, 2, device="cuda") for _ in range(2)]
        shards = [
            nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
            for part in parts
        ]
        leave_gradients(monkeypatch, shards)
        yield shards
    torch.distributed.destroy_process_group()


def leave_gradients(monkeypatch, parameters) -> None:
    """What stands in for ``torch.autograd.backward``."""

    def gradients(loss, retain_graph=None) -> None:
        for parameter in parameters:
            new = torch.empty_like(parameter).detach() * loss.detach()
            parameter.grad = new if parameter.grad is None else parameter.grad + new

    monkeypatch.setattr(torch.autograd, "backward", gradients)


def losses(parameters, number=2):
    for index in range(number):
        yield parameters[0].square().sum() + index * parameters[1].sum()


def optimizer_of(parameters, base=torch.optim.Adam, **options) -> UnbiasedMultiGradient:
    options = {"fused": True, "nonfinite": "skip"} | options
    return UnbiasedMultiGradient(parameters, base, **options)


def test_reading_a_fake_value_raises(parameters):
    """Else the tests below could not fail."""
    with pytest.raises(DataDependentOutputException):
        bool(parameters[0].sum() > 0)
    with Waits() as waits:
        float(parameters[0].detach().sum())
        torch.zeros(()).to("cuda")
    assert waits.found == ["read", "copy"]


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize(
    ("rule", "number"), [*((rule, 2) for rule in RULES), (BisectorProjection(), 3)]
)
def test_backward_and_step_do_not_wait(parameters, rule, number, priority):
    optimizer = optimizer_of(parameters, rule=rule, priority=priority)
    with Waits() as waits:
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.accumulate():
                optimizer.backward(losses(parameters, number))
            optimizer.backward(losses(parameters, number))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.step(lambda: losses(parameters, number))
    assert waits.found == []
    assert {tensor.device.type for tensor in vars(optimizer.last).values()} == {"cuda"}


def test_sharded_parameters_do_not_wait(shards):
    optimizer = optimizer_of(shards)

    def losses():
        for _ in range(2):
            yield torch.empty((), device="cuda", requires_grad=True) * 1

    with Waits() as waits:
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.backward(losses())
            nn.utils.clip_grad_norm_(shards, 1.0)
            optimizer.step()
    assert waits.found == []
    assert optimizer.last.weights.is_cuda


def test_backward_with_a_scaler_does_not_wait(parameters):
    optimizer = optimizer_of(parameters)
    scaler = GradScaler("cpu")  # for "cuda" disables itself without a GPU; it follows the losses
    with Waits() as waits:
        for _ in range(2):
            optimizer.backward(losses(parameters), scaler=scaler)
    assert waits.found == []


def test_raising_reads_one_flag(parameters):
    """Somebody has to ask the device whether to raise."""
    optimizer = optimizer_of(parameters, nonfinite="raise")
    with Waits() as waits:
        optimizer.backward(losses(parameters))
        optimizer.step()
    assert waits.found == ["read"]


def test_skipping_reads_one_flag_where_the_base_is_not_fused(parameters):
    optimizer = optimizer_of(parameters, fused=False)
    with Waits() as waits:
        optimizer.backward(losses(parameters))
        assert waits.found == []
        optimizer.step()
    assert waits.found.count("read") >= 1


def test_masked_step_leaves_no_trace_on_the_base(parameters):
    """What a GradScaler would leave there must not decide a later step of the base alone."""
    optimizer = optimizer_of(parameters)
    with Waits():
        optimizer.step(lambda: losses(parameters))
    assert not hasattr(optimizer.base, "found_inf")
    assert not hasattr(optimizer.base, "grad_scale")
