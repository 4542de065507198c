"""BatchNorm merged into the layers before it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from robust_app.batch_norm import BatchNorm, clean_statistics, estimate
from robust_app.folding import fold, merged
from robust_app.interval import Interval
from robust_app.layers import Residual
from robust_app.margins import margin_bounds
from robust_app.models import build
from robust_app.precision import InFloat32, first_in_float32
from tests.robust_app.networks import DIGITS, digits_network, images, randn, scaled

# --- For good


@pytest.mark.parametrize("training", [True, False])
def test_folding_keeps_outputs_and_bounds_and_the_plain_networks_keys(training):
    network = digits_network()
    estimate(network, [images(20), images(20, seed=1)])
    network.train(training)
    folded = fold(network)
    assert folded.training == training
    plain = build("digits-cnn", DIGITS, 10, mean=[0.4], std=[0.3])
    plain.double().load_state_dict(folded.state_dict())  # strict: keys and shapes
    x, labels = images(seed=2), torch.arange(6)
    box = Interval.around(x, 0.03)
    network.eval()
    for other in (folded, plain):
        torch.testing.assert_close(other(x), network(x))
        torch.testing.assert_close(
            margin_bounds(other, box, labels), margin_bounds(network, box, labels)
        )


def test_folding_after_layers_with_a_bias_and_groups():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="reflect"),
        scaled(BatchNorm(4)),
        scaled(BatchNorm(4)),
        nn.Flatten(),
        nn.Linear(36, 3),
        scaled(BatchNorm(3)),
    ).double()
    estimate(network, [randn(8, 2, 3, 3)])
    x = randn(5, 2, 3, 3, seed=1)
    torch.testing.assert_close(fold(network)(x), network.eval()(x))


def test_folding_leaves_the_network_as_it_is_and_shares_nothing():
    network = digits_network().eval()
    before = copy.deepcopy(network.state_dict())
    folded = fold(network)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_folding_without_batch_norm_is_an_equal_copy():
    network = build("digits-cnn", DIGITS, 10)
    folded = fold(network)
    assert str(folded) == str(network)
    torch.testing.assert_close(folded.state_dict(), network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Sequential(BatchNorm(2)), "nothing"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), BatchNorm(2)), "ReLU"),
        (nn.Sequential(Residual(BatchNorm(2))), "something inside Residual"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), BatchNorm(2))), "inside Sequential"),
    ],
)
def test_what_cannot_be_folded_is_refused(network, found):
    with pytest.raises(ValueError, match=f"follow a Conv2d or Linear layer, found .*{found}"):
        fold(network)


# --- For a step


def outputs_and_gradients(network, make, x, box):
    """Logits, bounds and the parameters' gradients of both, of what ``make`` makes of it."""
    with clean_statistics(network, x):
        layers = make(network)
        logits = layers(box.center)
        bounds = margin_bounds(layers, box, torch.zeros(len(x), dtype=torch.int64))
    total = (logits * randn(*logits.shape, seed=3)).sum() + bounds.square().sum()
    return logits, bounds, *torch.autograd.grad(total, list(network.parameters()))


def merged_in_float32(network: nn.Module) -> nn.Module:
    return merged(first_in_float32(network))


@pytest.mark.parametrize("make", [merged, merged_in_float32])
def test_merging_changes_neither_outputs_nor_bounds_nor_gradients(make):
    network, x = digits_network(), images()
    box = Interval(images(seed=1), torch.full_like(x, 0.1))
    torch.testing.assert_close(
        outputs_and_gradients(network, make, x, box),
        outputs_and_gradients(network, lambda same: same, x, box),
    )


@pytest.mark.parametrize("make", [merged, merged_in_float32])
def test_merging_leaves_the_network_alone_and_has_no_batch_norm(make):
    network, x = digits_network(), images()
    names = [name for name, _ in network.named_parameters()]
    with clean_statistics(network, x):
        layers = make(network)
    assert not any(isinstance(layer, BatchNorm) for layer in layers)
    assert isinstance(layers[1], InFloat32) == (make is merged_in_float32)
    assert [name for name, _ in network.named_parameters()] == names
    assert not list(layers[0].parameters())  # no copy that an optimizer might take for one


def test_what_cannot_be_merged_stays_as_it_is():
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert merged(plain) is plain
    first = nn.Sequential(BatchNorm(2), nn.Linear(2, 2))
    with clean_statistics(first, torch.randn(3, 2)):
        assert list(merged(first)) == list(first)
    residual = Residual(nn.Sequential(nn.Linear(2, 2), BatchNorm(2)))
    assert merged(residual) is residual


def test_merging_without_clean_statistics_is_refused():
    with pytest.raises(RuntimeError, match="clean_statistics"):
        merged(digits_network())


class Doubled(nn.Linear):
    """Computes something else than the layer it is derived from."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer", [Doubled(2, 2), parametrizations.weight_norm(nn.Linear(2, 2))])
def test_what_is_not_plainly_affine_is_not_merged(layer):
    network = nn.Sequential(layer, scaled(BatchNorm(2)))
    x = torch.randn(5, 2)
    with clean_statistics(network, x):
        torch.testing.assert_close(merged(network)(x), network(x))
    with pytest.raises(ValueError, match="follow a Conv2d or Linear layer, found"):
        fold(network)


def test_with_bf16_merging_rounds_but_little():
    torch.manual_seed(0)
    network, x = build("digits-cnn", DIGITS, 10, batch_norm=True), images(64).float()
    with clean_statistics(network, x), torch.no_grad():
        exact = network(x)
    with torch.autocast("cpu", torch.bfloat16), clean_statistics(network, x), torch.no_grad():
        rounded = merged(network)(x)
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()
