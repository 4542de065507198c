import pytest
import torch
from torch import nn

from robust_app.batch_norm import BatchNorm
from robust_app.errors import UserError
from robust_app.layers import Normalize
from robust_app.models import MODELS, build, parameter_count

MNIST, CIFAR10, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)


def conv(inputs, outputs, kernel):
    return outputs * inputs * kernel * kernel + outputs


def dense(inputs, outputs):
    return inputs * outputs + outputs


# Weights and biases, layer by layer, by hand, for c channels and an image of 2h × 2h pixels.
PARAMETERS = {
    "dm-small": lambda c, h: (
        conv(c, 16, 4) + conv(16, 32, 4) + dense(32 * (h - 1) ** 2, 100) + dense(100, 10)
    ),
    "dm-medium": lambda c, h: (
        conv(c, 32, 3)
        + conv(32, 32, 4)
        + conv(32, 64, 3)
        + conv(64, 64, 4)
        + dense(64 * (h // 2) ** 2, 512)
        + dense(512, 512)
        + dense(512, 10)
    ),
    "dm-large": lambda c, h: (
        conv(c, 64, 3)
        + conv(64, 64, 3)
        + conv(64, 128, 3)
        + 2 * conv(128, 128, 3)
        + dense(128 * h**2, 512)
        + dense(512, 10)
    ),
    "dm-small-strided": lambda c, h: (
        conv(c, 16, 4) + conv(16, 32, 4) + dense(32 * (h // 2) ** 2, 100) + dense(100, 10)
    ),
    "cnn7": lambda c, h: PARAMETERS["dm-large"](c, h),
    "cnn-small": lambda c, h: (
        conv(c, 16, 3) + conv(16, 32, 3) + dense(32 * h**2, 512) + dense(512, 10)
    ),
    "cnn-medium": lambda c, h: (
        conv(c, 32, 3)
        + conv(32, 64, 3)
        + conv(64, 128, 3)
        + conv(128, 256, 3)
        + dense(256 * h**2, 512)
        + dense(512, 512)
        + dense(512, 10)
    ),
    "cnn-large": lambda c, h: (
        conv(c, 64, 3)
        + conv(64, 64, 3)
        + conv(64, 128, 3)
        + conv(128, 256, 3)
        + conv(256, 256, 3)
        + dense(256 * h**2, 512)
        + dense(512, 10)
    ),
    "table-f-a": lambda c, h: (
        conv(c, 8, 3) + conv(8, 16, 3) + dense(16 * h**2, 100) + dense(100, 10)
    ),
    "table-f-b": lambda c, h: (
        conv(c, 16, 3) + conv(16, 32, 3) + dense(32 * h**2, 100) + dense(100, 10)
    ),
    "table-f-c": lambda c, h: (
        conv(c, 32, 3) + conv(32, 64, 3) + dense(64 * h**2, 100) + dense(100, 10)
    ),
    "table-f-d": lambda c, h: (
        conv(c, 8, 4) + conv(8, 16, 4) + dense(16 * (h - 1) ** 2, 512) + dense(512, 10)
    ),
    "table-f-e": lambda c, h: (
        conv(c, 16, 4) + conv(16, 32, 4) + dense(32 * (h - 1) ** 2, 512) + dense(512, 10)
    ),
    "table-f-f": lambda c, h: (
        conv(c, 32, 4) + conv(32, 64, 4) + dense(64 * (h - 1) ** 2, 512) + dense(512, 10)
    ),
    "table-f-g": lambda c, h: (
        conv(c, 8, 3)
        + conv(8, 16, 3)
        + conv(16, 32, 3)
        + conv(32, 64, 3)
        + dense(64 * h**2, 512)
        + dense(512, 10)
    ),
    "table-f-h": lambda c, h: (
        conv(c, 16, 3)
        + conv(16, 32, 3)
        + conv(32, 64, 3)
        + conv(64, 128, 3)
        + dense(128 * h**2, 512)
        + dense(512, 10)
    ),
    "table-f-i": lambda c, h: (
        conv(c, 8, 3)
        + conv(8, 8, 4)
        + conv(8, 16, 3)
        + conv(16, 16, 4)
        + dense(16 * (h // 2) ** 2, 512)
        + dense(512, 10)
    ),
    "table-f-j": lambda c, h: (
        conv(c, 16, 3)
        + conv(16, 16, 4)
        + conv(16, 32, 3)
        + conv(32, 32, 4)
        + dense(32 * (h // 2) ** 2, 512)
        + dense(512, 10)
    ),
    "digits-cnn": lambda c, h: (
        conv(c, 16, 3) + conv(16, 32, 4) + dense(32 * h**2, 64) + dense(64, 10)
    ),
}


def build_without_memory(name, input_shape, classes=10, **options):
    with torch.device("meta"):
        return build(name, input_shape, classes, **options)


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


@pytest.mark.parametrize("input_shape", [DIGITS, MNIST, CIFAR10], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_those_computed_by_hand(name, input_shape):
    expected = PARAMETERS[name](input_shape[0], input_shape[1] // 2)
    assert parameter_count(name, input_shape, classes=10) == expected
    network = build_without_memory(name, input_shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("dm-small", 16 + 32 + 100),
        ("cnn7", 64 + 64 + 128 + 128 + 128 + 512),
        ("cnn-medium", 32 + 64 + 128 + 256 + 512 + 512),
    ],
)
def test_batch_norm_has_a_scale_and_a_bias_in_place_of_the_bias_before_it(name, hidden):
    plain = parameter_count(name, MNIST, classes=10)
    network = build_without_memory(name, MNIST, batch_norm=True)
    assert sum(parameter.numel() for parameter in network.parameters()) == plain + hidden


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


@pytest.mark.parametrize("name", MODELS)
def test_batch_norm_is_before_every_relu_and_nowhere_else(name):
    layers = list(build_without_memory(name, CIFAR10, batch_norm=True))
    normalised = [i for i, layer in enumerate(layers) if isinstance(layer, BatchNorm)]
    activated = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    assert [i + 1 for i in normalised] == activated
    assert all(layers[i - 1].bias is None for i in normalised)
    rest = [type(layer) for layer in layers if not isinstance(layer, BatchNorm)]
    assert rest == [type(layer) for layer in build_without_memory(name, CIFAR10)]


def test_batch_norm_fits_the_channels():
    network = build("digits-cnn", DIGITS, 10, batch_norm=True).eval()
    assert network(torch.rand(2, *DIGITS)).shape == (2, 10)


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


@pytest.mark.parametrize(("wrong", "nearest"), [("dm-smal", "dm-small"), ("DM-Large", "dm-large")])
def test_an_unknown_name_is_answered_with_the_nearest_one(wrong, nearest):
    with pytest.raises(UserError, match=f"the nearest known is '{nearest}'$"):
        build(wrong, MNIST, 10)


@pytest.mark.parametrize("wrong", ["?", "", "resnet"])
def test_a_name_near_to_none_is_answered_with_where_they_are_listed(wrong):
    with pytest.raises(UserError, match=r"; `robust-app models` shows what is known$"):
        build(wrong, MNIST, 10)


@pytest.mark.parametrize(("height", "width"), [(1, 28), (28, 1), (2, 2)])
def test_too_small_an_image_is_refused(height, width):
    with pytest.raises(UserError, match=f"{height}×{width} pixels are too small for dm-small"):
        build("dm-small", (1, height, width), 10)


def test_a_single_class_is_refused():
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        build("digits-cnn", DIGITS, 1)


def test_architectures_read_as_in_the_paper():
    assert MODELS["dm-medium"].layers == (
        "Conv 32 3×3+1, Conv 32 4×4+2, Conv 64 3×3+1, Conv 64 4×4+2, FC 512, FC 512"
    )
    assert MODELS["table-f-i"].layers == (
        "Conv 8 3×3+1, Conv 8 4×4+2, Conv 16 3×3+1, Conv 16 4×4+2, FC 512"
    )
    assert all("\n" not in model.description for model in MODELS.values())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_an_architecture_is_left_unread(name):
    model = MODELS[name]
    read = [
        f"Conv {conv.channels} {conv.kernel}×{conv.kernel}+{conv.stride}"
        for conv in model.convolutions
    ]
    read += [f"FC {units}" for units in model.dense]
    assert ", ".join(read) == model.layers
