import pytest
import torch
from torch import nn

from robust_app.errors import UserError
from robust_app.layers import Normalize
from robust_app.models import MODELS, build

MNIST, CIFAR10, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)

# Weights and biases, layer by layer, by hand.
DM_SMALL_MNIST = (16 * 16 + 16) + (32 * 256 + 32) + (32 * 13 * 13 * 100 + 100) + (1000 + 10)
DM_MEDIUM_MNIST = (
    (32 * 9 + 32)
    + (32 * 32 * 16 + 32)
    + (64 * 32 * 9 + 64)
    + (64 * 64 * 16 + 64)
    + (64 * 7 * 7 * 512 + 512)
    + (512 * 512 + 512)
    + (5120 + 10)
)
DM_LARGE_CIFAR10 = (
    (64 * 27 + 64)
    + (64 * 64 * 9 + 64)
    + (128 * 64 * 9 + 128)
    + 2 * (128 * 128 * 9 + 128)
    + (128 * 16 * 16 * 512 + 512)
    + (5120 + 10)
)
DIGITS_CNN = (16 * 9 + 16) + (32 * 16 * 16 + 32) + (32 * 4 * 4 * 64 + 64) + (640 + 10)


def build_without_memory(name, input_shape, classes=10):
    with torch.device("meta"):
        return build(name, input_shape, classes)


def operations(network, input_shape):
    """Floating-point operations of one image: 2 for each weight used, in Conv2d and Linear."""
    total = 0

    def count(layer, _inputs, output):
        nonlocal total
        positions = output[0, 0].numel()  # 1 after a Linear
        total += 2 * layer.weight.numel() * positions

    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    network(torch.empty(1, *input_shape, device="meta"))
    return total


@pytest.mark.parametrize(
    ("name", "input_shape", "expected"),
    [
        ("dm-small", MNIST, DM_SMALL_MNIST),
        ("dm-medium", MNIST, DM_MEDIUM_MNIST),
        ("dm-large", CIFAR10, DM_LARGE_CIFAR10),
        ("digits-cnn", DIGITS, DIGITS_CNN),
    ],
)
def test_parameter_counts_are_those_computed_by_hand(name, input_shape, expected):
    network = build_without_memory(name, input_shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "input_shape", "millions"),
    [
        ("dm-small", MNIST, 3.95),
        ("dm-medium", MNIST, 24.3),
        ("dm-large", MNIST, 229),
        ("dm-large", CIFAR10, 301),
    ],
)
def test_operation_counts_are_the_published_ones(name, input_shape, millions):
    network = build_without_memory(name, input_shape)
    assert operations(network, input_shape) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_maps_images_to_logits(name):
    network = build_without_memory(name, CIFAR10, classes=7)
    assert network(torch.empty(2, *CIFAR10, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_every_hidden_layer_and_no_other_is_followed_by_relu(name):
    layers = list(build_without_memory(name, CIFAR10))
    weighted = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d | nn.Linear)]
    activated = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    assert [i + 1 for i in weighted[:-1]] == activated
    assert weighted[-1] == len(layers) - 1


def test_same_seed_gives_same_weights():
    def weights():
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in build("digits-cnn", DIGITS, 10).parameters()])

    assert torch.equal(weights(), weights())


def test_normalisation_is_the_first_layer_where_statistics_are_given():
    plain = build("digits-cnn", DIGITS, 10)
    normalised = build("digits-cnn", DIGITS, 10, mean=[0.5], std=[0.25])
    assert not any(isinstance(layer, Normalize) for layer in plain)
    assert isinstance(normalised[0], Normalize)
    x = torch.rand(2, *DIGITS)
    torch.testing.assert_close(normalised(x), normalised[1:]((x - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], None), (None, [0.5]), ([0.5], [0.5]), ([0.5] * 3, [0.5])]
)
def test_statistics_must_fit_the_channels(mean, std):
    with pytest.raises(ValueError, match="mean and std must"):
        build("digits-cnn", (3, 8, 8), 10, mean, std)


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("dm-smal", "dm-small"), ("DM-Large", "dm-large"), ("?", "dm-")]
)
def test_an_unknown_name_is_answered_with_the_nearest_one(wrong, nearest):
    with pytest.raises(UserError, match=nearest):
        build(wrong, MNIST, 10)


@pytest.mark.parametrize(("height", "width"), [(1, 28), (28, 1), (2, 2)])
def test_too_small_an_image_is_refused(height, width):
    with pytest.raises(UserError, match=f"{height}×{width} pixels are too small for dm-small"):
        build("dm-small", (1, height, width), 10)


def test_a_single_class_is_refused():
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        build("digits-cnn", DIGITS, 1)


def test_architectures_read_as_in_the_paper():
    assert str(MODELS["dm-medium"]) == (
        "Conv 32 3×3+1, Conv 32 4×4+2, Conv 64 3×3+1, Conv 64 4×4+2, FC 512, FC 512"
    )
    assert all("\n" not in model.description for model in MODELS.values())
