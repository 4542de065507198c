"""Fast input gradients beside those of torch's own convolution."""

import pytest
import torch
from torch import nn

from robust_app import models
from robust_app.small_patches import Conv2d, applies

GEOMETRIES = {
    "first layer of DM-Small": ((1, 16, 4, 2, 1), (9, 8)),
    "first layer of DM-Large": ((3, 64, 3, 1, 1), (5, 6)),
    "uneven": ((2, 12, (2, 3), (2, 1), (1, 0), (1, 2)), (7, 8)),
}


def pair(geometry, **options):
    """The layer and torch's own with the same parameters."""
    torch.manual_seed(0)
    ours = Conv2d(*geometry, **options).double()
    theirs = nn.Conv2d(*geometry, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(geometry, size):
    return torch.randn(3, geometry[0], *size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("geometry", "size"), GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_torchs(geometry, size, bias):
    layers = pair(geometry, bias=bias)
    x = images(geometry, size)
    assert applies(layers[0], x)
    outputs = [layer(x) for layer in layers]
    assert torch.equal(*outputs)
    direction = torch.randn_like(outputs[0])
    first, second = (
        torch.autograd.grad(output, [x, *layer.parameters()], direction, create_graph=True)
        for output, layer in zip(outputs, layers, strict=True)
    )
    torch.testing.assert_close(first, second)
    # And once more: a penalty on the input gradient.
    penalties = [
        torch.autograd.grad(gradients[0].square().sum(), layer.weight)
        for gradients, layer in zip((first, second), layers, strict=True)
    ]
    torch.testing.assert_close(*penalties)


def test_gradients_under_autocast():
    gradients = []
    points = images((1,), (9, 8)).detach().float()
    for layer in pair((1, 16, 4, 2, 1)):
        layer.float()
        x = points.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).square().sum().backward()
        gradients.append([x.grad, layer.weight.grad, layer.bias.grad])
    assert {part.dtype for part in gradients[0]} == {torch.float32}
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_the_input_gradient_holds_no_more_memory_than_it_needs():
    layer, _ = pair((1, 16, 4, 2, 1))
    x = images((1,), (9, 8))
    layer(x).sum().backward()
    assert x.grad.untyped_storage().nbytes() == x.nbytes


def test_only_where_it_gains():
    x = torch.zeros(1, 4, 8, 8)
    assert not applies(Conv2d(4, 16, 3), x)
    assert not applies(Conv2d(4, 64, 3, groups=2), x)
    assert not applies(Conv2d(4, 64, 3, padding="same"), x)
    assert not applies(Conv2d(4, 64, 3, padding=1, padding_mode="circular"), x)
    assert not applies(Conv2d(4, 64, 3), torch.zeros(1, device="meta"))
    assert applies(Conv2d(4, 64, 3), x)


def test_the_networks_use_it():
    network = models.build("dm-small", (1, 28, 28), 10)
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    first = next(layer for layer in network if isinstance(layer, nn.Conv2d))
    assert "_Convolution" in type(first(x).grad_fn).__name__
