"""What layers compute in float32 stays within the bounds of rounding of what they are."""

import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robust_app.batch_norm import BatchNorm
from robust_app.bounds import propagate
from robust_app.interval import Interval
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import ElementwiseAffine, Normalize
from robust_app.plain_networks import in_float64
from robust_app.rounding import OVERFLOW, UNITS, rounded, rounding_error

IMAGE = (2, 4, 4)
COMPOSED = (nn.Sequential,)


def affine_layers() -> dict[str, nn.Module]:
    return {
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(32, 7)),
        "linear without bias": nn.Sequential(nn.Flatten(), nn.Linear(32, 7, bias=False)),
        "linear on the last of three dimensions": nn.Linear(4, 3),
        "conv": nn.Conv2d(2, 5, 3, padding=1),
        "conv in groups": nn.Conv2d(2, 4, 2, stride=2, groups=2, bias=False),
        "conv of reflections": nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        "average": nn.AvgPool2d(2),
        "adaptive average": nn.AdaptiveAvgPool2d((2, 3)),
        "normalize": Normalize(mean=[0.3, 0.7], std=[0.01, 3.0]),
        "elementwise": ElementwiseAffine(torch.randn(IMAGE), torch.randn(IMAGE)),
        "batch norm": BatchNorm(2),
        "torch's batch norm": nn.BatchNorm2d(2),
        "torch's batch norm without weights": nn.BatchNorm2d(2, affine=False),
    }


def activations() -> dict[str, nn.Module]:
    layers = [
        nn.LogSigmoid(),
        nn.Sigmoid(),
        nn.Softsign(),
        nn.Tanh(),
        nn.Tanhshrink(),
        nn.Hardsigmoid(),
        nn.SELU(),
        nn.CELU(0.3),
        nn.ELU(2.5),
        nn.Softplus(beta=3),
        nn.Softshrink(0.2),
        nn.LeakyReLU(0.3),
        nn.PReLU(2),
        nn.ReLU(),
        nn.ReLU6(),
        nn.Hardtanh(),
        nn.Hardshrink(),
        nn.Threshold(0.1, 0.1),
        nn.MaxPool2d(2),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Identity(),
        nn.Dropout(),
    ]
    return {type(layer).__name__: layer for layer in layers}


def extremes() -> dict[str, nn.Module]:
    """Activations whose parameter is most of the bound, or below 0."""
    return {
        "steep CELU": nn.CELU(1e4),
        "steep ELU": nn.ELU(1e4),
        "ELU below 0": nn.ELU(-3.0),
        "flat Softplus": nn.Softplus(beta=1e-3),
        "Softplus below 0": nn.Softplus(beta=-1e-3),
        "LeakyReLU below 0": nn.LeakyReLU(-0.3),
    }


def error_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """At the images themselves; also of a Flatten before a layer."""
    for part in layer if isinstance(layer, COMPOSED) else [layer]:
        error = rounding_error(part, Interval(x, torch.zeros_like(x)))
        x = part(x)
    return torch.zeros_like(x) if error is None else error


def randomised(layer: nn.Module, seed: int) -> nn.Module:
    """Parameters and statistics of very different sizes, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if tensor.is_floating_point() and "std" not in name:
                sizes = 10 ** torch.empty_like(tensor).uniform_(-4, 4, generator=generator)
                signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                tensor.copy_(sizes if "var" in name else sizes * signs)
    return layer.eval()


@pytest.mark.parametrize("name", [*affine_layers(), *activations(), *extremes()])
def test_float32_is_nearer_than_the_bound(name):
    for seed in range(10):
        torch.manual_seed(seed)
        layer = randomised((affine_layers() | activations() | extremes())[name], seed)
        x = torch.randn(50, *IMAGE) * 10 ** torch.empty(50, *IMAGE).uniform_(-3, 3)
        with torch.no_grad():
            exact = in_float64(layer)
            bound = error_of(exact, x.double())
            distance = (layer(x).double() - exact(x.double())).abs()
        assert bound.dtype == torch.float64
        assert (distance <= bound).all()
        assert bound.shape == distance.shape


@pytest.mark.parametrize("name", [name for name in affine_layers() if "average" not in name])
def test_the_bound_is_of_the_size_of_what_float32_errs(name):
    """Else it would certify nothing: within the factor that worst cases and averages differ by."""
    torch.manual_seed(0)
    layer = affine_layers()[name].eval()
    x = torch.rand(500, *IMAGE)
    with torch.no_grad():
        exact = in_float64(layer)
        bound = error_of(exact, x.double())
        distance = (layer(x).double() - exact(x.double())).abs()
    assert bound.max() < 500 * distance.max()


def exactly(numbers: torch.Tensor) -> list[Fraction]:
    return [Fraction(number) for number in numbers.flatten().tolist()]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_a_sum_of_products_is_within_its_bound_in_rational_numbers(seed, terms):
    """Of terms that cancel, in the order that is at hand, against arithmetic without rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, terms, generator=generator)
    x = torch.randn(1, terms, generator=generator) * 2.0 ** torch.randint(
        -20, 20, (1, terms), generator=generator
    )
    layer = nn.Linear(terms, 1, bias=True)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-(weight * x).sum())  # nothing is left but what rounding leaves
        computed = layer(x)
        exact = sum(w * h for w, h in zip(exactly(weight), exactly(x), strict=True))
        exact += Fraction(layer.bias.item())
        [bound] = exactly(error_of(in_float64(layer), x.double()))
    assert abs(Fraction(computed.item()) - exact) <= bound


@pytest.mark.parametrize("name", [*affine_layers(), *activations(), *extremes()])
def test_the_bound_of_a_box_is_above_those_of_its_points(name):
    torch.manual_seed(0)
    layer = in_float64(randomised((affine_layers() | activations() | extremes())[name], 0))
    layer, shape = (layer[1], (32,)) if isinstance(layer, COMPOSED) else (layer, IMAGE)
    center, radius = torch.randn(2, 50, *shape, dtype=torch.float64)
    box = Interval(center, radius.abs() * (torch.rand(50, *shape) < 0.7))
    with torch.no_grad():
        whole = rounding_error(layer, box)
        for side in (-1, -0.3, 0, 1):
            point = center + side * box.radius
            alone = rounding_error(layer, Interval(point, 0 * point))
            assert (whole is None) == (alone is None)
            assert whole is None or (whole >= alone * (1 - 1e-12)).all()


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_sizes_are_those_of_partial_sums(seed, bias):
    """The largest that any of a layer's terms add up to, by size, anywhere in a box."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    # On either side of 0, across it, at it, and 0 itself.
    ends = torch.randn(2, 40, 6, generator=generator, dtype=torch.float64).mul_(2).round_().div_(2)
    lower, upper = ends.amin(0), ends.amax(0)
    at_lower, at_upper = (end.unsqueeze(1) * layer.weight for end in (lower, upper))
    with torch.no_grad():
        found = rounding_error(layer, Interval.between(lower, upper))
        own = layer.bias if bias else torch.zeros(5, dtype=torch.float64)
        most = torch.maximum(at_lower, at_upper).relu().sum(2) + own.relu()
        least = torch.minimum(at_lower, at_upper).neg().relu().sum(2) + (-own).relu()
        terms = ((lower != 0) | (upper != 0)).double().sum(1, keepdim=True)
        expected = rounded(terms + 3, torch.maximum(most, least))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("terms", [1, 2, 9, 100])
def test_the_worst_sum_is_within_the_bound(terms):
    """A product that is rounded by half a unit, then numbers that are lost, half a unit each."""
    half = 2.0**-24
    weight = torch.full((terms,), 1.0)
    x = torch.full((terms,), half)
    weight[0] = x[0] = 1 + 2.0**-12
    total = weight[0] * x[0]
    for term in [*(weight * x)[1:], torch.tensor(half)]:
        total = total + term
    layer = nn.Linear(terms, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.fill_(half)
        exact = layer(x[None].double()).item()
        bound = error_of(layer, x[None].double()).item()
    lost = exact - total.item()
    assert lost == pytest.approx((terms + 1) * half, rel=1e-6)  # one product, all sums, the bias
    assert lost <= bound < (terms + 4) * half * 1.01


@pytest.mark.parametrize("layer", [nn.AvgPool2d(3), nn.AdaptiveAvgPool2d(1)])
def test_the_worst_mean_is_within_the_bound(layer):
    """Of a pixel beside which eight others are lost, with the division that loses most."""
    half, even = 2.0**-24, 1 + 2.0**-22 * torch.arange(1000.0)
    quotients = even / 9
    first = even[(even.double() / 9 - quotients.double()).argmax()]
    image = torch.full((1, 1, 3, 3), half)
    image[0, 0, 0, 0] = total = first
    for pixel in image.flatten()[1:]:
        total = total + pixel
    assert total == first
    lost = (image.double().mean() - (total / 9).double()).item()
    assert lost > 8.5 * half / 9  # eight sums, and as much of another as ninths can lose
    assert lost <= error_of(layer, image.double()).item() < 11 * half / 9


def test_roundings_add_up_as_highams_gamma_does():
    unit = Fraction(1, 2**24)
    for count in (1, 100, 5408, 2**17):
        gamma = count * unit / (1 - count * unit)
        bound = rounded(count, torch.ones(1, dtype=torch.float64)).item()
        assert 1 < bound / float(gamma) < 1.002
    assert torch.finfo(torch.float32).eps / 2 == float(unit) < UNITS[torch.float64]
    assert UNITS[torch.float32] == 16 * float(unit)


def test_what_may_overflow_has_no_bound():
    layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        large = torch.tensor([[OVERFLOW / 2, OVERFLOW / 2]], dtype=torch.float64)
        assert error_of(layer, large).isinf().all()
        assert error_of(layer, large * 0.99).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_what_may_overflow_has_no_bound(dtype):
    sizes = torch.tensor([0.0, OVERFLOW * 0.99, OVERFLOW, OVERFLOW * 1.01], dtype=dtype)
    assert rounded(3, sizes).isfinite().tolist() == [True, True, False, False]
    assert rounded(3, sizes[3:]).isinf().all()


def test_so_many_roundings_that_they_may_be_all_there_is_have_no_bound():
    one = torch.ones(1)
    assert rounded(2**17, one).isfinite().all()
    assert rounded(torch.tensor([2.0**18]), one).isinf().all()


def test_what_is_switched_off_is_not_rounded():
    """Zeros count neither as terms nor in sums: the same bound as without them."""
    torch.manual_seed(0)
    few, many = nn.Linear(3, 2), nn.Linear(300, 2)
    with torch.no_grad():
        many.weight[:, ::100] = few.weight
        many.bias.copy_(few.bias)
        x = torch.zeros(1, 300, dtype=torch.float64)
        x[0, ::100] = torch.rand(3)
        bounds = error_of(few.double(), x[:, ::100]), error_of(many.double(), x)
        torch.testing.assert_close(*bounds, rtol=1e-12, atol=0)


def test_each_place_of_an_image_has_the_terms_that_a_kernel_sees_there():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64) * (torch.rand(2, 4, 5, 5) < 0.5)
    patches = F.unfold(x, 3, padding=1).unflatten(1, (2, 18))  # (batch, groups, terms, places)
    with torch.no_grad():
        bounds = error_of(layer, x).flatten(2)
        for output in range(6):
            linear = nn.Linear(18, 1).double()
            linear.weight.copy_(layer.weight[output].view(1, -1))
            linear.bias.copy_(layer.bias[output : output + 1])
            for place in (0, 12, 23):
                alone = error_of(linear, patches[:, output // 3, :, place])
                torch.testing.assert_close(bounds[:, output, place], alone[:, 0])


def test_underflow_is_within_the_bound():
    """Products below the smallest normal number lose what γ knows nothing of."""
    layer = nn.Linear(64, 1, bias=False)
    x = torch.full((1, 64), 2.0**-75)
    with torch.no_grad():
        layer.weight.fill_(1.25 * 2.0**-76)  # each product is 0 in float32
        assert layer(x).item() == 0.0
        exact = in_float64(layer)
        bound = error_of(exact, x.double())
        assert 0 < exact(x.double()).item() <= bound.item() < 1e-30


def test_every_layer_with_bounds_of_a_box_has_bounds_of_rounding():
    composed = {"Sequential", "Residual"}
    of_training_alone = {"InFloat32"}
    kinds = {
        kind for kind in propagate.registry if issubclass(kind, nn.Module) and kind is not nn.Module
    }
    # Of the modules, and not of the examples in their docstrings, which may have been run before.
    ours = {kind for kind in kinds if hasattr(sys.modules[kind.__module__], kind.__name__)}
    ours = {kind for kind in ours if kind.__module__.split(".")[0] in ("torch", "robust_app")}
    missing = {kind.__name__ for kind in ours - set(rounding_error.registry)}
    assert missing == composed | of_training_alone


def test_a_layer_without_a_rule_is_refused():
    with pytest.raises(UnsupportedLayer, match=r"no rounding error for the layer GELU: register"):
        error_of(nn.GELU(), torch.zeros(1))


def test_an_activation_that_grows_exponentially_is_refused():
    """CELU below 0 is α exp(x/α) for α < 0: its error is above any multiple of its input's size."""
    layer, x = nn.CELU(-0.5), torch.tensor([-20.3])
    exact = layer(x.double()).item()
    assert abs(layer(x).item() - exact) > 1e6
    assert propagate(layer, Interval(x, torch.zeros(1))).center.item() == pytest.approx(exact)
    with pytest.raises(UnsupportedLayer, match=r"rounding error for the layer CELU: its alpha"):
        error_of(layer, x)


def test_flushed_denormals_are_within_the_bound():
    x = torch.full((1, 3), 2.0**-126)
    weight = torch.full((1, 3), 0.5)
    assert torch.set_flush_denormal(True)
    try:
        computed = F.linear(x, weight).item()
    finally:
        torch.set_flush_denormal(False)
    layer = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        distance = abs(layer(x.double()).item() - computed)
        assert distance <= error_of(layer, x.double()).item()
