"""Certificates are about what float32 computes: no counterexample is left to its rounding."""

import copy
import math

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.certificates import (
    ball,
    certified,
    computed_margins,
    enclose,
    enclosures,
)
from robust_app.crown import alpha_crown, crown_ibp
from robust_app.errors import UserError
from robust_app.exact import decide
from robust_app.interval import Interval
from robust_app.layer_rules import flattened
from robust_app.layers import ElementwiseAffine, Normalize, Residual
from robust_app.margins import margin_bounds
from robust_app.plain_networks import in_float64
from robust_app.pullback import pull_back, pull_back_affine
from robust_app.verifiers import VERIFIERS
from tests.robust_app.networks import linear

pytest.importorskip("scipy")  # of the verifier exact


def naively(network, x, labels, epsilon) -> torch.Tensor:
    """Interval bounds in float32 as they come, taken for what they say."""
    with torch.no_grad():
        margins = margin_bounds(network, Interval.around(x, epsilon), labels)
    return (margins.scatter(1, labels.unsqueeze(1), math.inf) > 0).all(1)


def rounding_network(threshold: float) -> nn.Sequential:
    """z₀ - z₁ is 4x - threshold, by way of 4x + 2²⁴, which float32 has in steps of 2 only."""
    offset = 2.0**24
    return nn.Sequential(
        linear([[4.0]], [offset]),
        nn.ReLU(),
        linear([[1.0], [0.0]], [-offset, 0.0]),
        nn.ReLU(),
        linear([[1.0, 0.0], [0.0, 1.0]], [0.0, threshold]),
    ).eval()


@pytest.mark.parametrize("threshold", [2.5, 3.5])
def test_what_float32_bounds_certify_has_a_counterexample_and_is_not_certified(threshold):
    """At x = 0.75 float32 has 4 for 4x = 3, at 0.74 it has 2; with 2.5, real numbers are robust."""
    network, x, label = rounding_network(threshold), torch.tensor([[0.75]]), torch.tensor([0])
    nearby = torch.tensor([[0.74]])
    assert (nearby - x).abs() <= 0.01 + 1e-6
    with torch.no_grad():
        assert network(x).argmax(1) == 0
        assert network(nearby).argmax(1) == 1
        exact = network.double()(nearby.double())[0]
        assert (exact[0] > exact[1]) == (threshold == 2.5)
        network.float()
    assert naively(network, x, label, 0.011)
    for name, verifier in VERIFIERS.items():
        verdict = verifier.decide(network, x, label, 0.011, 10.0)
        assert not verdict.certified.any(), name


def test_in_real_numbers_the_margin_that_is_left_certifies():
    """The same, but for an offset that rounds nothing."""
    network = rounding_network(2.5)
    with torch.no_grad():
        network[0].bias.zero_()
        network[2].bias.zero_()
    for name, verifier in VERIFIERS.items():
        arguments = network, torch.tensor([[0.75]]), torch.tensor([0]), 0.011, 10.0
        assert verifier.decide(*arguments).certified.all(), name


def cancelling(seed: int, offset: float, width: int = 6) -> nn.Sequential:
    """A network whose hidden values are far above what tells the classes apart."""
    torch.manual_seed(seed)
    first, second, last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 3)
    with torch.no_grad():
        first.bias.copy_(offset * (1 + torch.rand(width)))
        second.bias.copy_(-second.weight @ first.bias + offset * (torch.rand(width) - 0.3))
        middle = second(first(torch.full((1, 3), 0.5))).relu()
        last.bias.copy_(-last(middle)[0] + last.bias)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).eval()


def points(x: torch.Tensor, epsilon: float, count: int) -> torch.Tensor:
    """Float32 images of the balls, corners among them: ``(count, batch, ...)``."""
    offsets = torch.empty(count, *x.shape).uniform_(-1, 1)
    offsets[::2] = offsets[::2].sign()
    return (x + epsilon * offsets).clamp(0, 1)


def attacked(network, x, labels, epsilon, count=300) -> torch.Tensor:
    with torch.no_grad():
        logits = network(points(x, epsilon, count).flatten(0, 1))
    return (logits.argmax(1).view(count, -1) != labels).any(0)


@pytest.mark.parametrize("name", VERIFIERS)
@given(
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([1.0, 2.0**12, 2.0**17]),
    epsilon=st.sampled_from([0.0, 0.001, 0.03]),
)
@settings(max_examples=10)
def test_no_verifier_certifies_what_has_a_counterexample(name, seed, offset, epsilon):
    network = cancelling(seed, offset)
    x = torch.rand(2 if name == "exact" else 8, 3)
    labels = network(x).argmax(1)
    found = VERIFIERS[name].decide(network, x, labels, epsilon, 1.0).certified
    assert not (found & attacked(network, x, labels, epsilon)).any()


def test_float32_bounds_would_have_certified_counterexamples():
    """Else the test above had nothing to find."""
    wrongly = ours = 0
    for seed in range(40):
        network = cancelling(seed, 2.0**17)
        x = torch.rand(8, 3)
        labels = network(x).argmax(1)
        broken = attacked(network, x, labels, 0.001)
        wrongly += int((naively(network, x, labels, 0.001) & broken).sum())
        ours += int(certified(cancelling(seed, 1.0), x, labels, 0.001).sum())
    assert wrongly > 0
    assert ours > 0


def holds(box: Interval, values: torch.Tensor) -> bool:
    center, radius = box.center.double(), box.radius.double()
    return bool(((values.double() - center).abs() <= radius).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 2**32 - 1), epsilon=st.floats(0, 0.2))
@settings(max_examples=20)
def test_each_box_holds_what_is_computed(dtype, seed, epsilon):
    torch.manual_seed(seed)
    network = nn.Sequential(
        Normalize([0.3], [0.05]),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2)),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    x = torch.rand(4, 1, 4, 4)
    here = points(x, epsilon, 20)
    with torch.no_grad():
        exact = in_float64(network) if dtype == torch.float64 else network
        trace = list(enclosures(exact, ball(x.to(dtype), epsilon)))
        for (_, box), plain in zip(trace, flattened(network), strict=True):
            assert holds(box, here)
            here = plain(here.flatten(0, 1)).unflatten(0, (20, 4))
        last = enclose(*trace[-1])
        assert holds(last, here)


@pytest.mark.parametrize("small", ["body", "shortcut"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_of_two_branches_is_rounded(small, dtype):
    """2⁻²⁴ is lost beside 1, on whichever side; neither branch rounds anything itself."""
    tiny = nn.Hardtanh(0.0, 2.0**-24)
    layer = Residual(tiny) if small == "body" else Residual(nn.Identity(), tiny)
    one = torch.ones(1, 1)
    assert layer(one).item() == 1
    box = enclose(layer, Interval(one.to(dtype), torch.zeros(1, 1, dtype=dtype)))
    assert holds(box, layer(one))
    assert box.radius.item() < 1e-4


class Branches(Residual):
    """Affine branches, which a user may have linear relaxation take."""


pull_back.register(Branches)(pull_back_affine)


def test_what_branches_round_is_no_proof_by_linear_relaxation():
    """As :func:`rounding_network` with 2.5: real numbers are robust, float32's are not."""
    offset = 2.0**24
    body = nn.Sequential(linear([[4.0]], [offset]), linear([[1.0], [0.0]], [-offset, 0.0]))
    network = nn.Sequential(Branches(body, linear([[0.0], [0.0]], [0.0, 2.5]))).eval()
    x, label = torch.tensor([[0.75]]), torch.tensor([0])
    with torch.no_grad():
        assert network(x).argmax(1) == 0
        assert network(torch.tensor([[0.74]])).argmax(1) == 1
    for verifier in (crown_ibp, alpha_crown):
        assert not verifier(network, x, label, 0.01)


@pytest.mark.parametrize("verifier", [certified, crown_ibp])
@pytest.mark.parametrize("divisor", [4, 1000])
def test_a_sum_that_overflows_before_it_is_divided_proves_nothing(verifier, divisor):
    scale = torch.full((2, 2, 2), 1e38)
    scale[1] = 1.25e38
    pooling = nn.AvgPool2d(2, divisor_override=divisor)
    network = nn.Sequential(ElementwiseAffine(scale, torch.zeros(2, 2, 2)), pooling, nn.Flatten())
    x = torch.tensor([0.84, 0.9]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    with torch.no_grad():
        assert network(x + 0.019).isinf().any()
    assert not verifier(network.eval(), x, torch.tensor([1]), 0.02)


@pytest.mark.parametrize("verifier", [certified, crown_ibp])
def test_a_mean_that_underflows_when_it_is_divided_proves_nothing(verifier):
    """Where processors flush what is below the smallest normal number to 0."""
    smallest = torch.finfo(torch.float32).smallest_normal
    scale = torch.ones(2, 2, 2) * smallest * 1000 / 4 / 0.55  # pixels of 0.55 have it for a mean
    scale[0] *= 0.25
    pooling = nn.AvgPool2d(2, divisor_override=1000)
    network = nn.Sequential(ElementwiseAffine(scale, torch.zeros(2, 2, 2)), pooling, nn.Flatten())
    x, label = torch.full((1, 2, 2, 2), 0.6), torch.tensor([1])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        with torch.no_grad():
            assert network(x).argmax(1) == 1
            assert network(x - 0.1).argmax(1) == 0
        assert not verifier(network.eval(), x, label, 0.1)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
@pytest.mark.parametrize("verifier", [certified, crown_ibp])
def test_images_of_another_type_are_refused_without_parameters_too(verifier, dtype):
    network = nn.Sequential(nn.AvgPool2d((1, 2)), nn.Flatten())
    x, label = torch.ones(1, 2, 1, 2).to(dtype), torch.tensor([0])
    with pytest.raises(
        UserError, match=f"^x: expected torch.float32 or torch.float64 .*found {dtype}"
    ):
        verifier(network, x, label, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.floats(0, 1, width=32), st.floats(0, 1))
def test_the_ball_holds_its_ends_as_float32_has_them(dtype, pixel, epsilon):
    x = torch.tensor([[pixel]], dtype=torch.float32)
    box = ball(x.to(dtype), epsilon)
    assert box.center.dtype == dtype
    box = Interval(box.center.double(), box.radius.double())
    for end in (x - epsilon, x + epsilon, x - torch.tensor(epsilon), x + torch.tensor(epsilon)):
        end = end.clamp(0, 1).double()
        assert (end - box.center).abs() <= box.radius
    beyond = 1e-15 if dtype == torch.float64 else 1e-6
    assert (box.lower >= -beyond).all()
    assert (box.upper <= 1 + beyond).all()
    assert (box.radius <= epsilon + 1e-6).all()


def test_float64_bounds_certify_what_float32_bounds_leave():
    """Two logits that differ by less than float32 bounds allow for, beside one between the two."""
    network = linear([[1.0], [1.0]], [0.0, 0.0])
    x, label = torch.tensor([[0.5]]), torch.tensor([0])
    allowed = {
        dtype: computed_margins(layer, ball(x.to(dtype), 0.0), label)[1][0, 1].item()
        for dtype, layer in [(torch.float32, network), (torch.float64, in_float64(network))]
    }
    assert allowed[torch.float64] < allowed[torch.float32] / 8
    between = math.sqrt(allowed[torch.float64] * allowed[torch.float32])
    for margin, expected in [(between, True), (allowed[torch.float64] / 2, False)]:
        with torch.no_grad():
            network.bias[0] = margin
        assert certified(network, x, label, 0.0).item() == expected
        assert certified(in_float64(network), x, label, 0.0).item() == expected
    images, labels = torch.tensor([[0.5], [0.4], [0.6]]), torch.tensor([0, 1, 0])
    with torch.no_grad():
        network.bias[0] = between
    assert certified(network, images, labels, 0.0).tolist() == [True, False, True]


def test_a_network_that_overflows_is_not_certified():
    network = linear([[3e38, 3e38], [0.0, 0.0]], [0.0, 1.0])
    x = torch.tensor([[1.0, 0.5]])
    assert network(x).isinf().any()
    for name, verifier in VERIFIERS.items():
        assert not verifier.decide(network, x, torch.tensor([0]), 0.0, 1.0).certified.any(), name


def test_what_is_infinite_leaves_a_layer_as_anything_and_its_neighbours_alone():
    """Hardtanh brings infinity into range, but not inf - inf: bounds of real numbers say less."""
    box = Interval(torch.zeros(2, 2), torch.tensor([[math.inf, 1.0], [1.0, 1.0]]))
    out = enclose(nn.Hardtanh(), box)
    assert out.radius[0].isnan().all()
    assert out.radius[1].isfinite().all()


@pytest.mark.parametrize(("center", "radius"), [(1e6, 0.0), (0.0, 1e6)])
def test_a_box_pays_for_its_own_rounding(center, radius):
    """Hardtanh computes exactly: what is added is for the bounds' own arithmetic."""
    box = Interval(torch.full((1, 1), center), torch.full((1, 1), radius))
    out = enclose(nn.Hardtanh(-4e6, 4e6), box)
    assert (out.radius - radius).item() >= 1e6 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [-2.0, 1.01, math.nan])
def test_images_outside_of_the_domain_are_refused(value):
    """The ball within [0, 1] around -2 is the point 0, where this network says something else."""
    network = nn.Sequential(linear([[1.0], [-1.0]], [0.5, 0.0]), nn.ReLU(), nn.Identity())
    x, labels = torch.tensor([[0.9], [value]]), torch.tensor([0, 0])  # the second is misclassified
    for verifier in VERIFIERS.values():
        with pytest.raises(ValueError, match=r"x: expected images in \[0, 1\], found values from"):
            verifier.decide(network, x, labels, 0.1, 1.0)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.tensor([0, 7]), "classes from 0 to 2, found from 0 to 7"),
        (torch.tensor([-1, 0]), "classes from 0 to 2, found from -1 to 0"),
        (torch.tensor([0.0, 1.0]), "found torch.float32 of"),
        (torch.tensor([0]), "of shape \\(2,\\), found torch.int64 of \\(1,\\)"),
    ],
)
@pytest.mark.parametrize("network", [nn.Identity(), nn.Linear(3, 3)], ids=["last", "merged"])
def test_labels_that_are_no_classes_are_refused(network, labels, found):
    with pytest.raises(ValueError, match=f"^labels: expected .*{found}"):
        certified(network, torch.rand(2, 3), labels, 0.1)
    with pytest.raises(ValueError, match=f"^labels: expected .*{found}"):
        crown_ibp(network, torch.rand(2, 3), labels, 0.1)


@pytest.mark.parametrize("label", [-1, 3])
def test_the_exact_verifier_refuses_a_label_that_is_no_class(label):
    with pytest.raises(ValueError, match=r"^labels: expected classes from 0 to 2"):
        decide(nn.Linear(3, 3), torch.rand(3), label, 0.1, time_limit=1.0)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_what_is_no_tensor_or_number_is_refused_by_name(verifier):
    network, x, labels = nn.Sequential(nn.Linear(2, 2)), torch.rand(1, 2), torch.tensor([0])
    decide_by = VERIFIERS[verifier].decide
    with pytest.raises(TypeError, match=r"^epsilon must be a number, got '8/255'$"):
        decide_by(network, x, labels, "8/255", 1.0)
    with pytest.raises(TypeError, match="x: expected a tensor of images, found ndarray"):
        decide_by(network, x.numpy(), labels, 0.1, 1.0)
    with pytest.raises(TypeError, match=r"^epsilon must be a number, got True$"):
        decide_by(network, x, labels, True, 1.0)
    if verifier != "exact":  # which takes a label for each image
        with pytest.raises(TypeError, match="labels: expected a tensor of classes, found 0"):
            decide_by(network, x, 0, 0.1, 1.0)
        with pytest.raises(ValueError, match=r"found torch\.int64 of \(\) \(a single one"):
            decide_by(network, x, labels[0], 0.1, 1.0)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"^expected logits of shape \(batch, classes\)"):
        certified(nn.Identity(), torch.rand(2, 3, 2), torch.tensor([0, 0]), 0.1)


def test_halves_are_refused_by_name():
    network = nn.Sequential(nn.Linear(2, 2)).half()
    with pytest.raises(UserError, match=r"found 0\.bias in torch\.float16"):
        certified(network, torch.rand(1, 2), torch.tensor([0]), 0.1)


def test_the_network_itself_stays_as_it_is():
    network = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(0.1)).eval()
    certified(network, torch.rand(1, 2), torch.tensor([0]), 0.1)
    assert network[0].weight.dtype == torch.float32
    assert network[1].negative_slope == 0.1


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_a_radius_below_0_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"epsilon must be at least 0, got {epsilon}"):
        certified(nn.Identity(), torch.rand(1, 2), torch.tensor([0]), epsilon)


# --- What is told from what it seems, or refused


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


def wrongly_certified() -> dict[str, tuple[nn.Module, list[float], int, float, list[float]]]:
    """Networks, images, labels, radii, and images of the balls that are misclassified."""
    double = chain(
        nn.Threshold(0.1, -1e15), nn.ReLU(), linear([[0.0], [1.0]], [0.765, 0.0])
    ).double()
    return {
        "an overflow within a bounded layer": (
            chain(
                linear([[3e38, 3e38], [3e38, 3e38]], [0.0, 0.0]),
                linear([[1.0, -1.0]], [0.0]),
                nn.Hardtanh(),
                linear([[0.1], [0.1]], [0.0, 10.0]),
            ),
            [0.5, 0.5],
            1,
            0.2,
            [0.65, 0.65],
        ),
        "large numbers of the layer's own": (
            chain(
                linear([[1.0]], [-0.1]),
                nn.Threshold(0.0, -1e6),
                nn.ReLU(),
                linear([[0.0], [1.0]], [0.64, 0.0]),
            ),
            [0.4],
            0,
            0.355,
            [0.755],
        ),
        "the same in float64": (double, [0.4], 0, 0.37, [0.77]),
    }


@pytest.mark.parametrize("name", wrongly_certified())
def test_layers_that_bring_numbers_into_range_or_out_of_it_are_bounded(name):
    network, image, label, epsilon, nearby = wrongly_certified()[name]
    kind = next(network.parameters()).dtype
    with torch.no_grad():
        assert network(torch.tensor([nearby], dtype=kind)).argmax(1) != label
    assert not certified(network, torch.tensor([image]), torch.tensor([label]), epsilon)


@pytest.mark.parametrize("weight", [9e-10, 9e-9])
def test_what_the_solver_drops_is_allowed_for(weight):
    """In the ball a coefficient of a billionth meets numbers of millions."""
    network = chain(
        linear([[1e8]], [-5e7]), nn.ReLU(), linear([[0.0], [weight]], [4e-3 * weight / 9e-10, 0.0])
    )
    x, label = torch.tensor([[0.45]]), torch.tensor([0])
    with torch.no_grad():
        assert network(torch.tensor([[0.599]])).argmax(1) == 1
    for name, verifier in VERIFIERS.items():
        assert not verifier.decide(network, x, label, 0.15, 5.0).certified.any(), name


def test_layers_that_may_compute_anything_are_refused():
    x, label = torch.rand(1, 2), torch.tensor([0])
    hooked, parametrized, pruned = (nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    hooked[0].register_forward_hook(lambda layer, inputs, output: 11 * output)
    nn.utils.parametrizations.weight_norm(parametrized[0])
    nn.utils.prune.identity(pruned[0], "weight")
    for network, words in ((hooked, "hooks"), (parametrized, "param"), (pruned, "hooks")):
        for verifier in VERIFIERS.values():
            with pytest.raises(UserError, match=f"found {words}.* on 0; remove them first"):
                verifier.decide(network, x, label, 0.1, 1.0)


class Louder(nn.Linear):
    def __call__(self, x):
        return super().__call__((40 * x).sin())


def test_layers_that_somebody_gave_another_forward_are_refused():
    x, label = torch.rand(1, 2), torch.tensor([0])
    patched = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    patched[1].forward = lambda x: (40 * x).sin()
    for network in (patched, nn.Sequential(Louder(2, 2))):
        for verifier in VERIFIERS.values():
            own = r"its own \((forward|__call__)\) on"
            with pytest.raises(UserError, match=own):
                verifier.decide(network.eval(), x, label, 0.1, 1.0)


def test_images_are_those_that_the_network_sees():
    network, label = nn.Sequential(nn.Linear(2, 2)), torch.tensor([0])
    x = torch.rand(1, 2)
    for verifier in VERIFIERS.values():
        with pytest.raises(UserError, match=r"x: expected torch\.float32 .*found torch\.float64"):
            verifier.decide(network, x.double(), label, 0.1, 1.0)
        verifier.decide(copy.deepcopy(network).double(), x, label, 0.1, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            verifier.decide(network, x, label, 0.1, 1.0)


class Standardised(nn.Conv2d):
    """A convolution that keeps forward, and changes the weight in what forward calls."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


@pytest.mark.parametrize("verifier", VERIFIERS.values(), ids=VERIFIERS)
@pytest.mark.parametrize("own", ["class", "instance"])
def test_a_convolution_that_computes_something_else_has_no_bounds(verifier, own):
    layer = Standardised(1, 2, 3) if own == "class" else nn.Conv2d(1, 2, 3)
    if own == "instance":
        layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, -weight, bias)
    network = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    with pytest.raises(UserError, match=r"members of its own \(_conv_forward\) on 0"):
        verifier.decide(network, torch.full((1, 1, 4, 4), 0.5), torch.tensor([0]), 0.01, 10.0)
