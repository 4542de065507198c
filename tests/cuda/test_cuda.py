"""On a GPU: nothing waits for the device, and the numbers are the CPU's."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mogd import Threshold, UnbiasedMultiGradient
from robust_app import data, models
from robust_app.distributed import join
from robust_app.fosc import Stationarity
from robust_app.losses import Objective
from robust_app.methods import JOINT, METHODS, Attack
from robust_app.reporting import Silent
from robust_app.schedules import Phase, Setting
from robust_app.steps import Batch, Losses
from robust_app.training import Trainer
from tests.robust_app.runs import NEEDED, SHI, few_digits, full_strength

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


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_weighing_by_one_layer_does_not_wait():
    model = network("cuda")
    optimizer = UnbiasedMultiGradient(
        model.parameters(),
        torch.optim.Adam,
        nonfinite="skip",
        fused=True,
        weigh_by=[model[0].weight],
    )
    batches = [examples(step).cuda() for step in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    for x in batches:
        optimizer.step(lambda x=x: objectives(model, x))


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


# --- Steps of the application


def step_of(device: str) -> tuple[nn.Sequential, Losses, Batch, Setting]:
    """A step with everything in it: BatchNorm, an attack, CROWN bounds, regularisers."""
    torch.manual_seed(0)
    network = models.build("digits-cnn", (1, 8, 8), 10, batch_norm=True).to(device)
    x, start = torch.rand(2, 16, 1, 8, 8)
    parts = (x, torch.randint(10, (16,)), 2 * start - 1, torch.tensor(0.05))
    batch = Batch.of_images(*(part.to(device) for part in parts))
    now = Setting(
        phase=Phase.MAIN,
        epsilon=0.05,
        fosc_threshold=0.01,
        learning_rate=1e-3,
        natural_weight=0.5,
        crown_share=0.5,
        box_regularizers=0.5,
    )
    attack = Attack(steps=1, step=1.25)
    method = METHODS["advcrown-ibp"]
    losses = Losses(Objective(network), network, method, attack, Stationarity())
    return network, losses, batch, now


@pytest.mark.parametrize("name", ["natural", "adversarial", "certified", "mixed"])
def test_a_loss_and_its_gradient_are_the_cpus(name):
    found = []
    with join("cuda"):  # which asks for products of float32 in float32
        for device in ("cpu", "cuda"):
            network, losses, batch, now = step_of(device)
            [loss] = losses.of([name], batch, now)
            loss.backward()
            gradients = [parameter.grad.flatten() for parameter in network.parameters()]
            found.append((loss.detach().cpu(), torch.cat(gradients).cpu()))
    (loss, gradient), (other, another) = found
    torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-5)
    assert (gradient - another).norm() < 1e-3 * gradient.norm()


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_joint_step_does_not_wait():
    network, losses, batch, now = step_of("cuda")
    optimizer = UnbiasedMultiGradient(
        network.parameters(),
        torch.optim.Adam,
        nonfinite="skip",
        fused=True,
        priority=Threshold(losses.stationarity, limit=0.01),
    )
    optimizer.step(lambda: losses.of(JOINT, batch, now))  # what is made once, is made
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):
        optimizer.step(lambda: losses.of(JOINT, batch, now))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_there(method):
    config = full_strength(method, **NEEDED.get(method, {}))
    with join("cuda") as world:
        trainer = Trainer(config, few_digits().to(world.device), world)
        metrics = [trainer.train_epoch(Silent()) for _ in range(config.total_epochs)]
    for loss in METHODS[method].losses:
        assert metrics[5][f"{loss}_loss"] < metrics[0][f"{loss}_loss"]
    assert all(parameter.is_cuda for parameter in trainer.network.parameters())


def test_stages_after_batch_norm_train_there():
    stages = {"stages": 2, "stage_epochs": 1}
    config = full_strength("advibp", epochs=2, authors_weights=True, **SHI, **stages)
    with join("cuda") as world:
        digits = data.load("digits").to(world.device)
        trainer = Trainer(config, digits, world)
        metrics = [trainer.train_epoch(Silent()) for _ in range(4)]
    assert [epoch["stage"] for epoch in metrics] == [0, 0, 1, 2]
    assert metrics[-1]["verified_error"] <= 100
