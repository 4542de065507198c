import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.batch_norm import BatchNorm, clean_statistics
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import ElementwiseAffine, Normalize, Residual
from robust_app.pullback import LinearBound, inner_products, pull_back, pull_back_affine

VECTOR, IMAGE = (6,), (2, 5, 4)


def with_statistics(layer):
    """Not the initial ones, and some of the weights negative."""
    generator = torch.Generator().manual_seed(0)
    layer.running_mean.normal_(generator=generator)
    layer.running_var.uniform_(0.1, 2, generator=generator)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer


AFFINE = {
    "linear": (nn.Linear(6, 3), VECTOR),
    "linear without bias": (nn.Linear(6, 3, bias=False), VECTOR),
    "linear on the last of three dimensions": (nn.Linear(4, 3), IMAGE),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), IMAGE),
    "conv without bias": (nn.Conv2d(2, 3, 2, bias=False), IMAGE),
    "conv that leaves pixels over": (nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(0, 1)), IMAGE),
    "conv with small patches": (nn.Conv2d(2, 9, (2, 1), (2, 3), (1, 0), (2, 1)), IMAGE),
    "conv with small patches, no bias": (nn.Conv2d(2, 8, 2, bias=False), IMAGE),
    "conv with groups": (nn.Conv2d(2, 4, 3, groups=2), IMAGE),
    "conv with dilation": (nn.Conv2d(2, 2, 2, stride=2, dilation=2, padding=1), IMAGE),
    "conv same": (nn.Conv2d(2, 2, 3, dilation=2, padding="same"), IMAGE),
    "conv circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv reflect": (nn.Conv2d(2, 2, 3, padding=2, padding_mode="reflect"), IMAGE),
    "normalize": (Normalize([0.3, -0.5], [0.5, 2.0]), IMAGE),
    "elementwise": (ElementwiseAffine(*torch.randn(2, *IMAGE)), IMAGE),
    "identity": (nn.Identity(), IMAGE),
    "flatten": (nn.Flatten(), IMAGE),
    "unflatten": (nn.Unflatten(1, (2, 3)), VECTOR),
    "average pool": (nn.AvgPool2d(2, stride=1, padding=1), IMAGE),
    "average pool, divisor": (nn.AvgPool2d(3, divisor_override=-2), IMAGE),
    "adaptive average pool": (nn.AdaptiveAvgPool2d((2, 3)), IMAGE),
    "batch norm 1d": (with_statistics(nn.BatchNorm1d(6)), VECTOR),
    "batch norm 2d": (with_statistics(nn.BatchNorm2d(2)), IMAGE),
    "batch norm 2d, not affine": (with_statistics(nn.BatchNorm2d(2, affine=False)), IMAGE),
    "batch norm of ours": (with_statistics(BatchNorm(2)), IMAGE),
    "batch norm of ours, vectors": (with_statistics(BatchNorm(6)), VECTOR),
    "dropout": (nn.Dropout(0.5), VECTOR),
    "dropout 2d": (nn.Dropout2d(0.5), IMAGE),
}

for layer, _ in AFFINE.values():
    layer.double().eval()


def random_bound(layer, x, generator, spec=3):
    outputs = layer(x).shape
    coefficients = torch.randn(len(x), spec, *outputs[1:], generator=generator, dtype=x.dtype)
    constant = torch.randn(len(x), spec, generator=generator, dtype=x.dtype)
    return LinearBound(coefficients, constant)


def assert_same_function(layer, x, bound):
    pulled = pull_back(layer, bound, x.shape[1:])
    torch.testing.assert_close(
        inner_products(pulled.coefficients, x) + pulled.constant,
        inner_products(bound.coefficients, layer(x)) + bound.constant,
    )


@pytest.mark.parametrize(("layer", "shape"), AFFINE.values(), ids=AFFINE.keys())
@pytest.mark.parametrize("grad", [True, False])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=4)
def test_the_same_function_of_the_inputs(layer, shape, grad, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        assert_same_function(layer, x, random_bound(layer, x, generator))


def test_statistics_of_the_clean_batch():
    torch.manual_seed(0)
    layer = BatchNorm(2).double().train()
    clean, x = torch.randn(2, 4, *IMAGE, dtype=torch.float64)
    with clean_statistics(layer, clean):
        assert_same_function(layer, x, random_bound(layer, x, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        "conv",
        "conv with small patches",
        "conv circular",
        "batch norm 2d",
        "batch norm of ours",
    ],
)
def test_gradients_of_the_parameters(kind):
    """Those of a loss that goes through coefficients and constant."""
    layer, shape = AFFINE[kind]
    x = torch.randn(2, *shape, dtype=torch.float64)
    bound = random_bound(layer, x, torch.Generator().manual_seed(0))
    pulled = pull_back(layer, bound, x.shape[1:])
    through = inner_products(pulled.coefficients, x).square() + pulled.constant.square()
    at_origin = inner_products(bound.coefficients, layer(torch.zeros_like(x))) + bound.constant
    direct = inner_products(bound.coefficients, layer(x)) + bound.constant - at_origin
    parameters = list(layer.parameters())
    actual = torch.autograd.grad(through.sum(), parameters)
    loss = (direct.square() + at_origin.square()).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("kind", ["conv", "conv with small patches", "conv with dilation"])
def test_gradients_of_the_coefficients(kind):
    layer, shape = AFFINE[kind]
    x = torch.randn(2, *shape, dtype=torch.float64)
    gradients = []
    for rule in (pull_back, pull_back_affine):
        bound = random_bound(layer, x, torch.Generator().manual_seed(0))
        bound.coefficients.requires_grad_()
        pulled = rule(layer, bound, x.shape[1:])
        total = pulled.coefficients.square().sum() + pulled.constant.square().sum()
        gradients += torch.autograd.grad(total, bound.coefficients)
    torch.testing.assert_close(*gradients)


class ShiftedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.GELU(), "GELU: .* chains of affine layers and ReLU"),
        (nn.Sigmoid(), "Sigmoid"),
        (nn.MaxPool2d(2), "MaxPool2d"),
        (Residual(nn.Identity()), "Residual"),
        (ShiftedLinear(2, 2), "ShiftedLinear: it overrides Linear.forward"),
        (nn.BatchNorm2d(2).train(), "BatchNorm2d: it is in training mode"),
        (nn.BatchNorm2d(2, track_running_stats=False).eval(), "no running statistics"),
        (BatchNorm(2).train(), "BatchNorm: it has no statistics"),
        (nn.Dropout(0.5).train(), "Dropout: it is in training mode"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(layer, message):
    bound = LinearBound(torch.ones(1, 1, *IMAGE), torch.zeros(1, 1))
    with pytest.raises(UnsupportedLayer, match=message):
        pull_back(layer, bound, torch.Size(IMAGE))


def test_users_register_affine_layers():
    class Reverse(nn.Module):
        def forward(self, x):
            return 2 * x.flip(-1) - 1

    pull_back.register(Reverse)(pull_back_affine)
    bound = LinearBound(torch.tensor([[[1.0, 0.0, 3.0]]]), torch.tensor([[10.0]]))
    pulled = pull_back(Reverse(), bound, torch.Size([3]))
    assert pulled.coefficients.tolist() == [[[6.0, 0.0, 2.0]]]
    assert pulled.constant.tolist() == [[6.0]]
