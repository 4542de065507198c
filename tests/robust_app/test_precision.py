"""What is computed in fewer digits, and what never is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robust_app import precision, small_patches
from robust_app.batch_norm import BatchNorm
from robust_app.bounds import propagate
from robust_app.distributed import join
from robust_app.errors import UserError
from robust_app.evaluation import evaluate, misclassified, standard_and_certified
from robust_app.folding import merged
from robust_app.interval import Interval
from robust_app.layer_rules import flattened
from robust_app.layers import Normalize, Residual
from robust_app.losses import Objective, certified_loss
from robust_app.margins import margins_after
from robust_app.networks import build_network
from robust_app.precision import InFloat32, first_in_float32, of_losses
from robust_app.pullback import pull_back
from robust_app.reporting import Silent
from robust_app.rounding import rounding_error
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from robust_app.verifiers import VERIFIERS
from tests.robust_app.runs import ALONE, NEEDED, few_digits, full_strength, parameters_of, trained

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def products() -> tuple[str, str]:
    return (
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


def products_of_processors() -> tuple[str, str]:
    return (
        torch.backends.mkldnn.conv.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


def test_tf32_is_for_the_steps_of_a_run_alone():
    with join("cpu"):
        assert products() == ("ieee", "ieee")
        with precision.products_in("tf32"):
            assert products() == ("tf32", "tf32")
        assert products() == ("ieee", "ieee")
        with pytest.raises(RuntimeError), precision.products_in("tf32"):
            raise RuntimeError
        assert products() == ("ieee", "ieee")


@pytest.mark.parametrize("other", ["float32", "bf16"])
def test_products_are_what_they_were_before(other):
    before = products()
    with precision.products_in("tf32"):
        with precision.products_in(other):
            assert products() == ("ieee", "ieee")
        assert products() == ("tf32", "tf32")
    assert products() == before


@torch.no_grad()
def test_whatever_measures_takes_products_in_float32():
    """Also where it is called as a library, without a world to join."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(products() + products_of_processors())
            return x

    network = nn.Sequential(Spy(), nn.Flatten(), nn.Linear(4, 2)).eval()
    propagate.register(Spy)(
        lambda layer, interval: Interval(layer(interval.center), interval.radius)
    )
    rounding_error.register(Spy)(lambda layer, box: None)
    pull_back.register(Spy)(lambda layer, bound, shape: bound)
    x, labels = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    with precision.products_in("tf32"):
        standard_and_certified(network, x, labels, 0.1)
        evaluate(network, x, labels, 0.1, pgd_steps=1, pgd_restarts=1, seed=0)
        for verifier in VERIFIERS.values():
            verifier.decide(network, x, labels, 0.1, 1.0)
    assert set(seen) == {("ieee",) * 4}


@torch.no_grad()
def test_what_autocast_would_round_is_evaluated_as_it_is_verified():
    """Two logits that are one number in bf16."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    network[1].weight.copy_(torch.tensor([[1.0], [1.001]]))
    network[1].bias.zero_()
    x, labels = torch.ones(1, 1, 1, 1), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        assert misclassified(network, x, labels) == 0
        assert standard_and_certified(network, x, labels, 0.0).tolist() == [0, 1]
        errors = evaluate(network, x, labels, 0.0, pgd_steps=1, pgd_restarts=1, seed=0)
    assert (errors.misclassified, errors.certified) == (0, 1)


def test_processors_take_no_products_in_bf16():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert products_of_processors()[1] == "bf16"
        with precision.products_in("float32"):
            assert products_of_processors() == ("ieee", "ieee")
        assert products_of_processors()[1] == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_needs_a_gpu():
    precision.check("tf32", GPU)
    with pytest.raises(UserError, match=r"^precision: tf32 needs a GPU, found cpu$"):
        Trainer(full_strength("advibp", precision="tf32"), few_digits(), ALONE)


@pytest.mark.parametrize("method", ["natural", "advibp", "ibp", "advcrown-ibp"])
def test_bf16_rounds_the_products_of_training_and_nothing_that_is_kept(method):
    runs = [
        Trainer(
            full_strength(method, precision=name, **NEEDED.get(method, {})), few_digits(), ALONE
        )
        for name in ("float32", "bf16")
    ]
    metrics = [[run.train_epoch(Silent()) for _ in range(3)] for run in runs]
    exact, rounded = map(parameters_of, runs)
    assert not torch.equal(exact, rounded)
    for (name, loss), other in zip(metrics[0][-1].items(), metrics[1][-1].values(), strict=True):
        if name.endswith("_loss"):
            assert other == pytest.approx(loss, rel=0.05)
            assert other < metrics[1][0][name]
    state = runs[1].optimizer.state_dict()
    kept = list(runs[1].network.parameters())
    if state["moments"] is not None:
        kept += state["moments"]["exp_avg"].values()
    kept += [value for adam in state["state"].values() for value in adam.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    seen = runs[1].stage.losses.stationarity
    if seen.x_adv is not None:
        assert seen.x_adv.dtype is seen.x_adv.grad.dtype is torch.float32


def test_held_out_errors_are_those_of_the_saved_network_in_float32(tmp_path):
    config = full_strength("advibp", epochs=2, precision="bf16", epsilon=0.01)
    trainer = trained(config, tmp_path, (2,), few_digits())
    network = build_network(config, few_digits()).eval()
    network.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["network"])
    x, labels = trainer.held_out_x, trainer.held_out_labels
    wrong, proved = standard_and_certified(network, x, labels, config.evaluation_epsilon).tolist()
    measured = RunDirectory(tmp_path).metrics()[-1]
    assert measured["standard_error"] == 100 * wrong / len(x)
    assert measured["verified_error"] == 100 * (len(x) - proved) / len(x)


def test_bf16_is_on_in_the_losses_but_for_the_first_layer_and_off_in_what_measures(monkeypatch):
    config = full_strength("advibp", batch_norm=True, precision="bf16")
    trainer = Trainer(config, few_digits(), ALONE)
    seen: list[tuple[str, int, torch.dtype]] = []
    where = "measures"
    forward, objective = nn.Conv2d.forward, trainer.stage.losses.objective

    def look(layer: nn.Conv2d, x: Tensor) -> Tensor:
        output = forward(layer, x)
        seen.append((where, layer.in_channels, output.dtype))
        return output

    def trains(loss: Callable[[nn.Module], Tensor]) -> Tensor:
        nonlocal where
        where = "trains"
        try:
            return objective(loss)
        finally:
            where = "measures"

    monkeypatch.setattr(nn.Conv2d, "forward", look)
    monkeypatch.setattr(trainer.stage.losses, "objective", trains)
    trainer.train_epoch(Silent())
    first = {dtype for place, channels, dtype in seen if (place, channels) == ("trains", 1)}
    others = {dtype for place, channels, dtype in seen if place == "trains" and channels > 1}
    assert (first, others) == ({torch.float32}, {torch.bfloat16})
    measured = {dtype for place, _, dtype in seen if place == "measures"}
    assert torch.float32 in measured <= {torch.float32, torch.float64}


def test_a_threshold_of_the_first_layer_is_not_rounded_with_bf16():
    """Pixels up to 0.603 stay below it; bf16 has 0.6016 for it."""
    network = nn.Sequential(nn.Linear(1, 1), BatchNorm(1), nn.ReLU(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.fill_(-0.6034)
        network[3].weight.copy_(torch.tensor([[0.0], [1000.0]]))
        network[3].bias.fill_(0.0)
    box, labels = Interval(torch.tensor([[0.5]]), torch.tensor([[0.103]])), torch.tensor([0])

    def loss(layers: nn.Module) -> Tensor:
        return certified_loss(merged(layers), box, labels, crown_share=0.5)

    exact = of_losses(Objective(network), "float32", ALONE.device)(loss)
    torch.testing.assert_close(of_losses(Objective(network), "bf16", ALONE.device)(loss), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(network) > exact + 0.1


@pytest.mark.parametrize(
    ("network", "first"),
    [
        (nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), 0),
        (nn.Sequential(Normalize([0.5], [0.5]), nn.Conv2d(1, 1, 1), nn.Linear(1, 1)), 1),
        (nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(1, 1)), nn.Linear(1, 1)), 1),
        (nn.Sequential(weight_norm(nn.Linear(1, 1)), nn.Linear(1, 1), nn.ReLU()), 0),
        (nn.Sequential(Residual(nn.Linear(1, 1)), nn.Linear(1, 1), nn.ReLU()), 0),
        (nn.Sequential(BatchNorm(1), nn.Linear(1, 1), nn.Linear(1, 1)), 1),
    ],
    ids=["plain", "after Normalize", "nested", "parametrized", "residual", "after BatchNorm"],
)
def test_the_first_layer_with_a_matrix_is_in_float32(network, first):
    layers, within = flattened(network), first_in_float32(network)
    assert [isinstance(layer, InFloat32) for layer in within] == [
        at == first for at in range(len(layers))
    ]
    assert all(
        layer is (found.layer if isinstance(found, InFloat32) else found)
        for layer, found in zip(layers, within, strict=True)
    )


@pytest.mark.parametrize(
    "network",
    [
        nn.Linear(1, 1),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Linear(1, 1)),
        nn.Sequential(nn.Linear(1, 1), BatchNorm(1)),
    ],
    ids=["no layers in a row", "no matrix", "the last alone", "one before BatchNorm"],
)
def test_networks_without_a_first_layer_to_take_in_float32_are_left_alone(network):
    assert first_in_float32(network) is network


def test_the_attack_too_has_the_first_layer_in_float32_with_bf16(monkeypatch):
    trainer = Trainer(full_strength("advibp", precision="bf16"), few_digits(), ALONE)
    seen: list[tuple[bool, torch.dtype]] = []
    by_patches = small_patches._by_patches

    def look(outputs: Tensor, *rest: Any) -> Tensor:
        inputs = by_patches(outputs, *rest)
        seen.append((torch.is_autocast_enabled("cpu"), inputs.dtype))
        return inputs

    monkeypatch.setattr(small_patches, "_by_patches", look)
    trainer.train_epoch(Silent())
    assert set(seen) >= {(True, torch.float32)}
    assert {dtype for _, dtype in seen} == {torch.float32}


def test_layers_train_in_stages_with_bf16():
    config = full_strength("advibp", precision="bf16", epochs=1, stages=2, stage_epochs=1)
    trainer = Trainer(config, few_digits(), ALONE)
    metrics = [trainer.train_epoch(Silent()) for _ in range(3)]
    assert [line["stage"] for line in metrics] == [0, 1, 2]
    assert all(line["certified_loss"] > 0 for line in metrics)


def test_margins_are_summed_in_float32():
    """A difference that bfloat16 cannot hold decides an example."""
    last = nn.Linear(1, 2, bias=False)
    last.weight.data = torch.tensor([[1.0], [1.001]])
    box = Interval(torch.ones(1, 1), torch.zeros(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        margins = margins_after(last, box, torch.tensor([1]))
    torch.testing.assert_close(margins, torch.tensor([[0.001, 0.0]]), rtol=1e-3, atol=0)
