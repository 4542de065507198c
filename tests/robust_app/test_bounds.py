import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.batch_norm import BatchNorm
from robust_app.bounds import propagate
from robust_app.errors import UserError
from robust_app.interval import Interval
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import ElementwiseAffine, Normalize, Residual
from robust_app.margins import margin_bounds
from tests.robust_app.networks import linear, points

ROUNDING = 1e-9  # all tests that compare to it run in float64

VECTOR, IMAGE = (6,), (2, 5, 4)


def batch_norm(layer):
    """With statistics and weights that are not the initial ones, some of the weights negative."""
    generator = torch.Generator().manual_seed(0)
    layer.running_mean.normal_(generator=generator)
    layer.running_var.uniform_(0.1, 2, generator=generator)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer


AFFINE = {
    "linear": (nn.Linear(6, 3), VECTOR),
    "linear without bias": (nn.Linear(6, 3, bias=False), VECTOR),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), IMAGE),
    "conv with stride": (nn.Conv2d(2, 3, (3, 2), stride=2, bias=False), IMAGE),
    "conv with groups": (nn.Conv2d(2, 4, 3, groups=2), IMAGE),
    "conv with dilation": (nn.Conv2d(2, 2, 2, dilation=2, padding="same"), IMAGE),
    "conv circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), IMAGE),
    "normalize": (Normalize([0.3, -0.5], [0.5, 2.0]), IMAGE),
    "elementwise": (ElementwiseAffine(*torch.randn(2, *IMAGE)), IMAGE),
    "identity": (nn.Identity(), VECTOR),
    "flatten": (nn.Flatten(), IMAGE),
    "unflatten": (nn.Unflatten(1, (2, 3)), VECTOR),
    "average pool": (nn.AvgPool2d(2, stride=1, padding=1), IMAGE),
    "average pool, divisor": (nn.AvgPool2d(3, divisor_override=2), IMAGE),
    "adaptive average pool": (nn.AdaptiveAvgPool2d((2, 3)), IMAGE),
    "batch norm 1d": (batch_norm(nn.BatchNorm1d(6)), VECTOR),
    "batch norm 1d, sequence": (batch_norm(nn.BatchNorm1d(6)), (6, 2)),
    "batch norm 2d": (batch_norm(nn.BatchNorm2d(2)), IMAGE),
    "batch norm 2d, not affine": (batch_norm(nn.BatchNorm2d(2, affine=False)), IMAGE),
    "batch norm of ours": (batch_norm(BatchNorm(2)), IMAGE),
    "batch norm of ours, vectors": (batch_norm(BatchNorm(6)), VECTOR),
    "dropout": (nn.Dropout(0.5), VECTOR),
    "dropout 1d": (nn.Dropout1d(0.5), (6, 2)),
    "dropout 2d": (nn.Dropout2d(0.5), IMAGE),
    "dropout 3d": (nn.Dropout3d(0.5), (2, 2, 2, 2)),
    "alpha dropout": (nn.AlphaDropout(0.5), VECTOR),
    "feature alpha dropout": (nn.FeatureAlphaDropout(0.5), VECTOR),
}

MONOTONE = {
    "relu": (nn.ReLU(), VECTOR),
    "relu in place": (nn.ReLU(inplace=True), VECTOR),
    "relu6": (nn.ReLU6(), VECTOR),
    "hardtanh": (nn.Hardtanh(-0.5, 1.5), VECTOR),
    "leaky relu": (nn.LeakyReLU(0.1), VECTOR),
    "prelu": (nn.PReLU(6, init=0.3), VECTOR),
    "elu": (nn.ELU(0.7), VECTOR),
    "celu": (nn.CELU(0.7), VECTOR),
    "celu with alpha below 0": (nn.CELU(-0.7), VECTOR),
    "selu": (nn.SELU(), VECTOR),
    "sigmoid": (nn.Sigmoid(), VECTOR),
    "hardsigmoid": (nn.Hardsigmoid(), VECTOR),
    "log sigmoid": (nn.LogSigmoid(), VECTOR),
    "tanh": (nn.Tanh(), VECTOR),
    "tanhshrink": (nn.Tanhshrink(), VECTOR),
    "softplus": (nn.Softplus(2.0), VECTOR),
    "softsign": (nn.Softsign(), VECTOR),
    "softshrink": (nn.Softshrink(0.4), VECTOR),
    "hardshrink": (nn.Hardshrink(0.4), VECTOR),
    "threshold": (nn.Threshold(0.2, -1.0), VECTOR),
    "max pool": (nn.MaxPool2d(2, stride=1, padding=1), IMAGE),
    "max pool, dilated": (nn.MaxPool2d(2, dilation=2, ceil_mode=True), IMAGE),
    "adaptive max pool": (nn.AdaptiveMaxPool2d(2), IMAGE),
}

COMPOSITE = {
    "conv reflect": (nn.Conv2d(2, 2, 3, padding=2, padding_mode="reflect"), IMAGE),
    "conv replicate": (nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="replicate"), IMAGE),
    "sequential": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), VECTOR),
    "residual": (Residual(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), VECTOR),
    "residual, shortcut": (Residual(nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)), IMAGE),
    "network": (
        nn.Sequential(
            Normalize([0.5, 0.4], [0.3, 0.2]),
            nn.Conv2d(2, 4, 3, padding=1),
            batch_norm(nn.BatchNorm2d(4)),
            nn.ReLU(),
            Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2))),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 2 * 2, 5),
        ),
        IMAGE,
    ),
}

for layer, _ in (AFFINE | MONOTONE | COMPOSITE).values():
    layer.double().eval()


def parametrize(cases):
    return pytest.mark.parametrize(("layer", "shape"), cases.values(), ids=cases.keys())


@st.composite
def boxes(draw, shape, batch=2):
    """Boxes of all sizes, near and far from the origin, with some sides of length 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.floats(0, 4))
    size = draw(st.floats(0, 3))
    center = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    radius = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    return Interval(scale * center, size * radius * (radius > 0.1))


# --- propagate


def test_two_layers_by_hand():
    network = nn.Sequential(
        linear([[1.0, -1.0], [2.0, 1.0]], [0.0, -3.0]),
        nn.ReLU(),
        linear([[1.0, -2.0]], [0.5]),
    )
    box = Interval.between(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    # z1 = x1 - x2 in [-2, 1], z2 = 2 x1 + x2 - 3 in [-3, 1]; after ReLU both in [0, 1];
    # h1 - 2 h2 + 0.5 in [-1.5, 1.5].
    output = propagate(network, box)
    torch.testing.assert_close(output.lower, torch.tensor([[-1.5]]))
    torch.testing.assert_close(output.upper, torch.tensor([[1.5]]))


@parametrize(AFFINE)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_affine_rules_are_exact(layer, shape, data):
    """Bounds of an affine layer, from its Jacobian J: J c + b and |J| r."""
    box = data.draw(boxes(shape, batch=1))
    jacobian = torch.autograd.functional.jacobian(layer, box.center)
    expected = layer(box.center)
    radius = jacobian.view(expected.numel(), -1).abs() @ box.radius.flatten()
    output = propagate(layer, box)
    torch.testing.assert_close(output.center, expected)
    torch.testing.assert_close(output.radius, radius.view_as(expected))


@parametrize(MONOTONE)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_monotone_rules_are_exact(layer, shape, data):
    box = data.draw(boxes(shape))
    output = propagate(layer, box)
    torch.testing.assert_close(output.lower, layer(box.lower))
    torch.testing.assert_close(output.upper, layer(box.upper))


@parametrize(AFFINE | MONOTONE | COMPOSITE)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_rules_are_sound(layer, shape, data):
    box = data.draw(boxes(shape))
    with torch.no_grad():
        output = propagate(layer, box)
        for x in points(box):
            value = layer(x.clone())
            assert (value >= output.lower - ROUNDING).all()
            assert (value <= output.upper + ROUNDING).all()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_copies_the_bounds_of_pixels(mode):
    layer = nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode)
    plain = nn.Conv2d(2, 3, 3)
    plain.load_state_dict(layer.state_dict())
    x, radius = torch.randn(1, *IMAGE), torch.rand(1, *IMAGE)
    padded = Interval(*(nn.functional.pad(t, (1, 1, 2, 2), mode=mode) for t in (x, radius)))
    output, expected = propagate(layer, Interval(x, radius)), propagate(plain, padded)
    torch.testing.assert_close(output.center, expected.center)
    torch.testing.assert_close(output.radius, expected.radius)


def test_a_layer_used_twice_counts_twice():
    double = linear([[2.0, 0.0], [0.0, 2.0]], [0.0, 0.0])
    network = nn.Sequential(double, double)
    box = Interval(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(propagate(network, box).upper, torch.tensor([[10.0, 5.0]]))
    margins = margin_bounds(network, box, torch.tensor([0]))
    torch.testing.assert_close(margins, torch.tensor([[0.0, 1.0]]))  # 4 (2 - 1 - 0.75)


def test_users_register_rules_for_their_layers():
    class Negative(nn.Module):
        def forward(self, x):
            return -x

    @propagate.register
    def negative(layer: Negative, interval: Interval) -> Interval:
        return Interval(layer(interval.center), interval.radius)

    network = nn.Sequential(Negative(), nn.ReLU())
    output = propagate(network, Interval(torch.tensor([1.0]), torch.tensor([3.0])))
    assert torch.equal(output.lower, torch.tensor([0.0]))
    assert torch.equal(output.upper, torch.tensor([2.0]))


class OfLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


def test_a_forward_over_layers_is_told_of_its_ways():
    with pytest.raises(UnsupportedLayer, match=r"OfLayers: .*nn\.Sequential .*ONNX .*or register"):
        propagate(OfLayers(), Interval(torch.zeros(1, 2), torch.ones(1, 2)))


class DoubledSequential(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class ShiftedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "layer",
    [nn.GELU(), nn.Softmax(1), nn.Conv1d(1, 1, 1), DoubledSequential(), ShiftedLinear(2, 2)],
)
def test_a_layer_without_a_rule_is_refused_by_name(layer):
    box = Interval(torch.zeros(1, 2), torch.ones(1, 2))
    message = rf"no bounds for the layer {type(layer).__name__}: .*propagate\.register"
    for network in (layer, nn.Sequential(nn.Identity(), layer)):
        with pytest.raises(UnsupportedLayer, match=message):
            propagate(network, box)
        with pytest.raises(UnsupportedLayer, match=message):
            margin_bounds(network, box, torch.tensor([0]))


def of_both_signs(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -0.5]))
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(2).train(), "BatchNorm2d: it is in training mode"),
        (BatchNorm(2).train(), "BatchNorm: it has no statistics"),
        (nn.Dropout(0.5).train(), "Dropout: it is in training mode"),
        (nn.BatchNorm2d(2, track_running_stats=False).eval(), "no running statistics"),
        (nn.LeakyReLU(-0.1), r"LeakyReLU\(negative_slope=-0.1\) decreases"),
        (nn.PReLU(init=-0.1), "PReLU"),
        (of_both_signs(nn.PReLU(2)), "PReLU"),
        (nn.ELU(-1.0), "ELU"),
        (nn.Softplus(threshold=1), "Softplus"),
        (nn.Threshold(0.0, 1.0), "Threshold"),
        (nn.AvgPool2d(2, divisor_override=-1), "divisor_override is below 0"),
        (nn.MaxPool2d(2, return_indices=True), "returns indices"),
        (nn.AdaptiveMaxPool2d(2, return_indices=True), "returns indices"),
    ],
)
def test_a_layer_in_an_unsound_state_is_refused(layer, message):
    with pytest.raises(UnsupportedLayer, match=message):
        propagate(layer, Interval(torch.zeros(1, *IMAGE), torch.ones(1, *IMAGE)))


def test_a_refusal_is_an_error_of_the_user_and_of_type():
    assert issubclass(UnsupportedLayer, UserError)
    assert issubclass(UnsupportedLayer, TypeError)


# --- margins
