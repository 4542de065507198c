import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from robust_app.batch_norm import (
    BatchNorm,
    batch_norms,
    clean_statistics,
    estimate,
)
from robust_app.bounds import propagate
from robust_app.distributed import of_all_processes
from robust_app.interval import Interval
from robust_app.layer_rules import UnsupportedLayer
from robust_app.margins import layer_inputs, margin_bounds
from robust_app.models import build
from robust_app.regularizers import regularization
from tests.robust_app.networks import DIGITS, digits_network, images, randn, scaled

SHAPES = [(7, 3), (4, 3, 2, 5)]


# --- One layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_clean_pass_is_that_of_torchs_batch_norm(shape):
    ours, x = scaled(BatchNorm(3).double()), randn(*shape).requires_grad_()
    with clean_statistics(ours, x) as logits:
        output = logits()
    expected = F.batch_norm(x, None, None, ours.weight, ours.bias, training=True)
    torch.testing.assert_close(output, expected)
    wanted = (x, ours.weight, ours.bias)
    weights = randn(*shape, seed=1)
    torch.testing.assert_close(
        torch.autograd.grad((output * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_is_that_of_torchs_batch_norm(shape):
    layer, x = scaled(BatchNorm(3, eps=0.1).double()).eval(), randn(*shape)
    layer.running_mean.copy_(torch.tensor([0.5, -2, 0]))
    layer.running_var.copy_(torch.tensor([0.5, 2, 0]))
    expected = F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=0.1
    )
    torch.testing.assert_close(layer(x), expected)


def test_other_passes_use_the_clean_statistics_by_hand():
    layer = BatchNorm(1, eps=1e-9)
    clean = torch.tensor([[1.0], [3.0]], requires_grad=True)  # mean 2, deviation 1
    with clean_statistics(layer, clean):
        other = layer(torch.tensor([[5.0]]))
        box = propagate(layer, Interval(torch.tensor([[5.0]]), torch.tensor([[0.5]])))
    assert (other.item(), box.center.item(), box.radius.item()) == (3.0, 3.0, 0.5)
    # d/da of (5 - (a + b)/2) / (|a - b|/2) at (1, 3): -1/2 + 3/2; at b: -1/2 - 3/2
    torch.testing.assert_close(torch.autograd.grad(other, clean)[0], torch.tensor([[1.0], [-2.0]]))


def test_statistics_far_from_zero_lose_no_digits():
    x = 1000 + torch.tensor([[-1.0], [1.0]])
    with clean_statistics(layer := BatchNorm(1), x):
        scale, _ = layer.scale_and_shift()
    assert scale.item() == pytest.approx(1, rel=1e-4)


@given(scale=st.floats(-3, 3), where=st.floats(-1, 1))
def test_bounds_are_exact_for_a_channel(scale, where):
    layer = BatchNorm(2).double()
    with torch.no_grad():
        layer.weight.fill_(scale)
    center, radius = randn(1, 2, 1, 3), randn(1, 2, 1, 3, seed=1).abs()
    with clean_statistics(layer, randn(4, 2, 3, 3, seed=2)), torch.no_grad():
        box = propagate(layer, Interval(center, radius))
        inside = layer(center + where * radius)
        corners = torch.stack([layer(center - radius), layer(center + radius)])
    assert (box.lower - 1e-9 <= inside).all()
    assert (inside <= box.upper + 1e-9).all()
    torch.testing.assert_close(box.lower, corners.amin(0))
    torch.testing.assert_close(box.upper, corners.amax(0))


@pytest.mark.parametrize("shape", [(7, 2), (7, 4), (7, 3, 1), (3,)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="expected shape"):
        BatchNorm(3).eval()(torch.zeros(shape))


def test_one_value_per_channel_is_refused():
    with (
        pytest.raises(ValueError, match="more than one value per channel"),
        clean_statistics(BatchNorm(3), torch.zeros(1, 3)),
    ):
        pass


# --- clean_statistics ------------------------------------------------------------------------


def test_training_without_clean_statistics_is_refused():
    network, x = digits_network(), images()
    with pytest.raises(RuntimeError, match=r"enter robust_app\.batch_norm\.clean_statistics"):
        network(x)
    with pytest.raises(UnsupportedLayer, match=r"BatchNorm: .* enter .*clean_statistics"):
        margin_bounds(network, Interval.around(x, 0.1), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("error", [None, KeyError])
def test_statistics_are_forgotten_at_the_end(error):
    network, x = digits_network(), images()
    try:
        with clean_statistics(network, x):
            network(x)
            if error:
                raise error
    except KeyError:
        pass
    with pytest.raises(RuntimeError, match="clean_statistics"):
        network(x)
    copy.deepcopy(network)  # which tensors with a graph would refuse


def test_an_error_in_the_clean_pass_leaves_nothing_behind():
    network = digits_network()
    for _ in range(2):
        with pytest.raises(RuntimeError), clean_statistics(network, images()[..., :5]):
            pass
        assert not any(layer.has_statistics for layer in network if isinstance(layer, BatchNorm))


def passes_of(network):
    """A list that grows by one with each pass through the network."""
    passes = []
    network.register_forward_hook(lambda *_: passes.append(None))
    return passes


def test_logits_are_those_of_the_clean_pass_which_is_made_once():
    network, x = digits_network(), images()
    passes = passes_of(network)
    with clean_statistics(network, x) as logits:
        assert len(passes) == 1
        assert logits() is logits()
        assert len(passes) == 1
        torch.testing.assert_close(network(x), logits())
        assert not torch.allclose(network(images(seed=1)), logits())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_logits_are_lazy_where_no_statistics_are_needed(batch_norm):
    network, x = build("digits-cnn", DIGITS, 10, batch_norm=batch_norm).double(), images()
    network.train(not batch_norm)
    passes = passes_of(network)
    with clean_statistics(network, x) as logits:
        assert len(passes) == 0
        assert logits() is logits()
        assert len(passes) == 1
    torch.testing.assert_close(logits(), network(x))


def test_gradients_flow_through_the_statistics():
    network, x, labels = digits_network(), images(), torch.arange(6)
    first = network[1].weight

    def loss():
        with clean_statistics(network, x):
            margins = margin_bounds(network, Interval.around(x, 0.02), labels)
            return F.cross_entropy(network(images(seed=1)), labels) + F.cross_entropy(
                -margins, labels
            )

    (gradient,) = torch.autograd.grad(loss(), first)
    direction = randn(*first.shape, seed=3)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            first += sign * step * direction
            values.append(loss())
            first -= sign * step * direction
    numerical = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numerical, rtol=1e-5, atol=1e-7)


def test_attacks_need_no_graph_through_the_statistics():
    network, x = digits_network(), images()
    with torch.no_grad(), clean_statistics(network, x) as logits, torch.enable_grad():
        assert not logits().requires_grad
        other = images(seed=1).requires_grad_()
        (gradient,) = torch.autograd.grad(network(other).sum(), other)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_no_value_is_looked_at_which_on_a_gpu_would_wait_for_it():
    with torch.device("meta"):  # where values do not exist
        network = build("digits-cnn", DIGITS, 10, batch_norm=True)
        x, labels = torch.rand(6, *DIGITS), torch.arange(6)
        with clean_statistics(network, x) as logits:
            box = Interval.around(x, 0.1)
            loss = logits().sum() + margin_bounds(network, box, labels).sum()
            (loss + regularization(layer_inputs(network, box))).backward()
        estimate(network, [x])


# --- estimate --------------------------------------------------------------------------------


def test_running_statistics_are_weighted_means_of_batches():
    network = nn.Sequential(nn.Linear(3, 4), BatchNorm(4), nn.ReLU(), BatchNorm(4)).double()
    scaled(network[1])
    batches = [randn(5, 3), 1 + randn(5, 3, seed=1), 2 * randn(2, 3, seed=2)]
    estimate(network, iter(batches))

    weights = [5 / 12, 5 / 12, 2 / 12]
    for position in (1, 3):
        seen = []
        for x in batches:
            with clean_statistics(network, x), torch.no_grad():
                seen.append(network[:position](x))
        means = sum(w * x.mean(0) for w, x in zip(weights, seen, strict=True))
        variances = sum(w * x.var(0, correction=0) for w, x in zip(weights, seen, strict=True))
        torch.testing.assert_close(network[position].running_mean, means)
        torch.testing.assert_close(network[position].running_var, variances)


@pytest.mark.parametrize("training", [True, False])
def test_estimating_changes_the_running_statistics_alone(training):
    network = digits_network().train(training)
    network[3].eval()
    before, modes = copy.deepcopy(network), [module.training for module in network.modules()]
    estimate(network, [images()])
    assert [module.training for module in network.modules()] == modes
    changed = {
        name
        for name, value in network.state_dict().items()
        if not value.equal(before.state_dict()[name])
    }
    assert changed == {
        f"{index}.running_{which}"
        for index, layer in enumerate(network)
        if isinstance(layer, BatchNorm)
        for which in ("mean", "var")
    }
    assert network.eval()(images()).isfinite().all()


def test_a_frozen_layer_has_its_running_statistics_in_training_too():
    network, x = digits_network().train(), images()
    estimate(network, [1 - images()])
    first, *others = batch_norms(network)
    first.statistics_frozen = True
    before = network[: list(network).index(others[0])]
    with clean_statistics(network, x), torch.no_grad():
        assert all(map(torch.equal, first.scale_and_shift(), first.running_scale_and_shift()))
        mean, variance = others[0]._kept
        torch.testing.assert_close(mean, before(x).mean((0, 2, 3)))
        torch.testing.assert_close(variance, before(x).var((0, 2, 3), correction=0))


def test_estimating_leaves_a_frozen_layer_as_it_is():
    network, x = digits_network(), images()
    estimate(network, [1 - x])
    first, *others = batch_norms(network)
    first.statistics_frozen, before = True, first.running_scale_and_shift()
    estimate(network, [x])
    assert all(map(torch.equal, first.running_scale_and_shift(), before))
    with clean_statistics(network.train(), x):
        for layer in others:
            torch.testing.assert_close(layer.scale_and_shift(), layer.running_scale_and_shift())


def test_where_all_layers_are_frozen_no_pass_is_made_for_statistics():
    network = digits_network().train()
    for layer in batch_norms(network):
        layer.statistics_frozen = True
    estimate(network, iter(lambda: pytest.fail("asked"), None))
    network.register_forward_hook(lambda *_: pytest.fail("a pass"))
    with clean_statistics(network, images()):
        pass


def test_one_batchs_running_statistics_are_its_own():
    network, x = digits_network(), images()
    estimate(network, [x])
    with clean_statistics(network, x) as logits:
        torch.testing.assert_close(network.eval()(x), logits())


def test_nothing_to_estimate_from_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        estimate(digits_network(), [])


def test_without_batch_norm_no_batch_is_asked_for():
    estimate(build("digits-cnn", DIGITS, 10), iter(lambda: pytest.fail("asked"), None))


# --- Several processes -----------------------------------------------------------------------


class Loss(nn.Module):
    """The losses of a step with BatchNorm, behind a forward that can be wrapped."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, adversarial, labels):
        with clean_statistics(self.network, x) as logits:
            box = Interval.around(x, 0.02)
            margins = margin_bounds(self.network, box, labels)
            losses = [
                F.cross_entropy(scores, labels)
                for scores in (logits(), self.network(adversarial), -margins)
            ]
            return sum(losses) + regularization(layer_inputs(self.network, box))


def gradients_and_statistics(rank, world):
    """What a process finds with its share of a batch."""
    network = digits_network()
    loss = Loss(network)
    if world > 1:
        loss = DistributedDataParallel(loss)
    share = slice(rank, None, world)
    # Images that are brighter from one to the next: the shares' means differ.
    x = images(12) * torch.linspace(0.2, 1, 12).view(-1, 1, 1, 1)
    loss(x[share], images(12, seed=1)[share], (torch.arange(12) % 10)[share]).backward()
    gradients = {name: value.grad for name, value in network.named_parameters()}
    estimate(network, [x[share], images(12, seed=2)[share]])
    return gradients, dict(network.named_buffers())


def regularization_of_a_share(rank, world):
    """Its value, and the gradient that a process adds to the mean over processes."""
    centers = [[3.0, 1.0, -8.0], [-12.0, 0.5, -0.5]]  # the whole batch, of which ratios are < τ
    center = torch.tensor(centers[rank::world], dtype=torch.float64, requires_grad=True)
    radius = torch.full_like(center, 0.6)
    inputs = [
        (nn.Flatten(), Interval(center, radius / 4)),
        (nn.ReLU(), Interval(center, radius)),
        (nn.ReLU(), Interval(-center[:, :2] / 2, radius[:, :2])),  # another size and scale
    ]
    value = regularization(inputs)
    value.backward()
    return value.detach(), center.grad / world


def process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    values = of_all_processes(value * (rank + 1))
    (values * torch.tensor([[1.0], [10.0]]) * 100**rank).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        of_share = regularization_of_a_share(rank, 2)
    waits = [event.name for event in profiled.events() if event.name.startswith("gloo:")]
    found = (
        gradients_and_statistics(rank, 2),
        of_share,
        (values.detach(), value.grad),
        sorted(waits),
    )
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of 2 processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo"])
    torch.multiprocessing.start_processes(
        process, (str(folder),), nprocs=2, start_method="forkserver"
    )
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def test_processes_together_have_the_gradients_and_statistics_of_one(processes):
    alone = gradients_and_statistics(0, 1)
    assert all(gradient.any() for gradient in alone[0].values())
    for found, *_ in processes:
        torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-10)


def test_the_regularizers_are_those_of_the_whole_batch(processes):
    value, gradient = regularization_of_a_share(0, 1)
    for rank, (_, (found, gradient_of_share), *_) in enumerate(processes):
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(gradient_of_share, gradient[rank::2])


def test_the_regularizers_wait_as_often_for_two_layers_as_for_one(processes):
    """For radii, means of centres, and sums; backward for the last two: radii are given."""
    for *_, waits in processes:
        assert waits == ["gloo:all_gather"] * 3 + ["gloo:all_reduce"] * 2


def test_the_values_of_all_processes(processes):
    for rank, (_, _, (values, gradient), _) in enumerate(processes):
        assert values.tolist() == [[1, 2], [2, 4]]
        # Both processes' losses, 1 + 100 times, through the row that is this process's own.
        assert gradient.tolist() == [[101, 101], [2020, 2020]][rank]
    assert of_all_processes(torch.ones(1)).tolist() == [[1]]
