"""On a GPU: nothing waits for the device, and the numbers are the CPU's."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mogd import UnbiasedMultiGradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def network(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device)


def objectives(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Two losses that cannot both be met."""
    yield (model(x) - x[:, :2]).square().mean()
    yield (model(x) + 2 * x[:, :2]).square().mean()


def examples(step: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_backward_and_step_do_not_wait():
    model = network("cuda")
    optimizer = UnbiasedMultiGradient(
        model.parameters(), torch.optim.Adam, nonfinite="skip", fused=True
    )
    batches = [examples(step).cuda() for step in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    for x in batches:
        optimizer.zero_grad()
        optimizer.backward(objectives(model, x))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_skip_leaves_everything_as_it_was(fused):
    model = network("cuda")
    optimizer = UnbiasedMultiGradient(
        model.parameters(), torch.optim.Adam, nonfinite="skip", fused=fused
    )
    x = examples(0).cuda()
    optimizer.step(lambda: objectives(model, x))

    def everything() -> list[Tensor]:
        moments = optimizer.state_dict()["moments"]
        adam = [value for state in optimizer.state.values() for value in state.values()]
        small = [moments["count"], moments["norms"], moments["gramian"]]
        return [*model.parameters(), *adam, *small, *moments["exp_avg"].values()]

    before = [tensor.clone() for tensor in everything()]
    optimizer.step(lambda: (loss / 0 for loss in objectives(model, x)))
    assert all(map(torch.equal, everything(), before))
    assert optimizer.skipped == 1
    optimizer.step(lambda: objectives(model, x))
    assert not torch.equal(model[0].weight, before[0])
    assert optimizer.skipped == 1


def test_raise_names_the_loss():
    model = network("cuda")
    optimizer = UnbiasedMultiGradient(model.parameters())
    x = examples(0).cuda()
    with pytest.raises(FloatingPointError, match=r"losses\[1\]"):
        optimizer.backward([model(x).sum(), model(x).sum() / 0])


def stream(device: str) -> list[Tensor]:
    """The records of eight steps and the parameters after them."""
    model = network(device).double()
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.05, moment_decay=(0.5, 0.8))
    found = []
    for step in range(8):
        optimizer.backward(objectives(model, examples(step).to(device).double()))
        optimizer.step()
        found += vars(optimizer.last).values()
    return [tensor.detach().cpu() for tensor in (*found, *model.parameters())]


def test_cpu_and_cuda_agree():
    torch.testing.assert_close(stream("cuda"), stream("cpu"), rtol=1e-9, atol=1e-12)


def test_captured_graph_trains_on():
    """Replaying a captured step does what running it does, the moments included."""
    results = []
    for captured in (False, True):
        model = network("cuda")
        optimizer = UnbiasedMultiGradient(
            model.parameters(), torch.optim.Adam, nonfinite="skip", fused=True, capturable=True
        )
        x = examples(0).cuda()

        def step(model=model, optimizer=optimizer, x=x) -> None:
            optimizer.zero_grad()
            optimizer.backward(objectives(model, x))
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made lazily is made before the capture
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        replay = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay
        for index in range(1, 5):
            x.copy_(examples(index))
            replay()
        x.fill_(torch.nan)
        replay()
        torch.cuda.synchronize()
        gramian = optimizer.state_dict()["moments"]["gramian"]
        results.append([gramian, *(parameter.detach() for parameter in model.parameters())])
        assert optimizer.skipped == 1
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
