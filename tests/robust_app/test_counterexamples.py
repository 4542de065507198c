"""Networks that were certified once, each with the image of the ball that shows it wrong."""

import contextlib
import math
from typing import Generic, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from robust_app.batch_norm import BatchNorm
from robust_app.bounds import propagate
from robust_app.certificates import ball, certified
from robust_app.errors import UserError
from robust_app.evaluation import evaluate, misclassified, standard_and_certified
from robust_app.exact import decide
from robust_app.interval import Interval
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import ElementwiseAffine, Normalize, Residual, applied
from robust_app.plain_networks import in_float64
from robust_app.pullback import pull_back, pull_back_affine
from robust_app.rounding import rounding_error
from robust_app.verifiers import VERIFIERS
from tests.robust_app.networks import linear

pytest.importorskip("scipy")  # of the verifier exact

LABEL = torch.tensor([0])


def proofs(network: nn.Module, x: Tensor, epsilon: float) -> list[str]:
    """The verifiers that certify class 0, of those that have rules for the layers."""
    found = [name for name in ("ibp",) if bool(certified(network, x.clone(), LABEL, epsilon))]
    with contextlib.suppress(UnsupportedLayer):
        for name in VERIFIERS.keys() - {"ibp"}:
            if bool(VERIFIERS[name].decide(network, x.clone(), LABEL, epsilon, 5.0).certified):
                found.append(name)
    return found


def assert_refuted(network: nn.Module, x: float, nearby: float, epsilon: float) -> None:
    """Nothing certifies an image near which the network takes another class."""
    shape = (1, 1, 1, 1)
    assert abs(x - nearby) < epsilon
    assert applied(network, torch.full(shape, nearby)).argmax(1) == 1
    assert proofs(network, torch.full(shape, x), epsilon) == []


WORKING_IN_PLACE = {
    "the body, after Dropout": lambda: (nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True)), None),
    "the body, after Flatten": lambda: (nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True)), None),
    "the body's first layer": lambda: (nn.ReLU(inplace=True), None),
    "the shortcut": lambda: (nn.Identity(), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("where", WORKING_IN_PLACE)
def test_a_branch_that_works_in_place_leaves_the_other_what_it_reads(where):
    body, shortcut = WORKING_IN_PLACE[where]()
    residual = Residual(body, shortcut).eval()
    x = torch.tensor([[-1.0, 2.0]])
    assert residual(x.clone()).tolist() == [[-1.0, 4.0]]
    box = propagate(residual, Interval(x, torch.zeros_like(x)))
    assert box.center.tolist() == [[-1.0, 4.0]]


@pytest.mark.parametrize("where", WORKING_IN_PLACE)
def test_a_branch_that_works_in_place_trains_as_any(where):
    body, shortcut = WORKING_IN_PLACE[where]()
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    Residual(body, shortcut).eval()(2 * x).sum().backward()
    assert x.grad.tolist() == [[2.0, 4.0]]


def in_place_at_first() -> nn.Sequential:
    """Class 0 for pixels up to 0.5, and for those above where z₁ = x is less than 0.3."""
    threshold = nn.Threshold(0.5, 0.0, inplace=True)
    return nn.Sequential(threshold, nn.Flatten(), linear([[0.0], [1.0]], [0.3, 0.0])).eval()


def test_a_first_layer_that_works_in_place_leaves_the_images():
    network, x = in_place_at_first(), torch.full((1, 1, 1, 1), 0.45)
    assert_refuted(network, 0.45, 0.54, 0.1)
    found = evaluate(network, x, LABEL, 0.1, pgd_steps=20, pgd_restarts=5, seed=0)
    assert (found.misclassified, found.certified) == (0, 0)
    assert standard_and_certified(network, x, LABEL, 0.1).tolist() == [0, 0]
    assert misclassified(network, x, LABEL) == 0
    assert x.item() == pytest.approx(0.45)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


@pytest.fixture
def rules_for_halved():
    """Rules as a user registers them; a registry does not forget, but the class is the test's."""
    propagate.register(Halved)(lambda _, box: Interval(0.5 * box.center, 0.5 * box.radius))
    rounding_error.register(Halved)(lambda _, box: None)
    pull_back.register(Halved)(pull_back_affine)


@pytest.mark.usefixtures("rules_for_halved")
def test_a_users_layer_that_works_in_place_leaves_the_images():
    head = linear([[0.0], [1.0]], [0.12, 0.0])
    network = nn.Sequential(Halved(), nn.Flatten(), head, nn.ReLU()).eval()
    assert_refuted(network, 0.2, 0.29, 0.1)
    found = decide(network, torch.full((1, 1, 1), 0.2), 0, 0.1, time_limit=5.0).counterexample
    assert found is not None
    assert 0.24 < found.item() < 0.31  # z₁ = x / 2 is at least 0.12


@pytest.mark.usefixtures("rules_for_halved")
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_rules_are_not_for_classes_that_override_forward(verifier):
    class Negated(Halved):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    network = nn.Sequential(Negated(), linear([[1.0], [0.0]], [0.0, 0.0]))
    with pytest.raises(UnsupportedLayer, match=r"Negated: it overrides Halved\.forward; register"):
        VERIFIERS[verifier].decide(network, torch.tensor([[0.5]]), LABEL, 0.1, 1.0)


@pytest.mark.usefixtures("rules_for_halved")
def test_rounding_is_not_that_of_another_forward():
    class Tenfold(Halved):
        def forward(self, x: Tensor) -> Tensor:
            return 10 * x

    propagate.register(Tenfold)(lambda _, box: Interval(10 * box.center, 10 * box.radius))
    network = nn.Sequential(Tenfold(), linear([[1.0], [0.0]], [0.0, 0.0]))
    with pytest.raises(UnsupportedLayer, match=r"Tenfold: it overrides Halved\.forward; register"):
        certified(network, torch.tensor([[0.5]]), LABEL, 0.1)


def test_linear_bounds_are_not_for_classes_that_override_forward():
    class Tripled(Halved):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    propagate.register(Tripled)(lambda _, box: Interval(3 * box.center, 3 * box.radius))
    rounding_error.register(Tripled)(lambda _, box: 1e-3 * box.magnitude)
    pull_back.register(Halved)(lambda *_: pytest.fail("the rule of another forward"))
    network = nn.Sequential(Tripled(), linear([[1.0], [0.0]], [0.0, 1.4]))
    assert certified(network, torch.tensor([[0.6]]), LABEL, 0.1).tolist() == [True]
    for name in ("crown-ibp", "exact"):
        with pytest.raises(UnsupportedLayer, match=r"Tripled: it overrides Halved\.forward"):
            VERIFIERS[name].decide(network, torch.tensor([[0.6]]), LABEL, 0.1, 1.0)


class Decreasing(nn.ReLU):
    def _call_impl(self, x: Tensor) -> Tensor:
        return -x


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("of", ["its class", "itself"])
def test_layers_that_are_called_in_another_way_are_refused(verifier, of):
    layer = nn.ReLU() if of == "itself" else Decreasing()
    if of == "itself":
        layer._call_impl = lambda x: -x
    network = nn.Sequential(linear([[1.0]], [0.0]), layer, linear([[1.0], [0.0]], [0.0, 0.0]))
    assert network(torch.tensor([[0.5]])).argmax(1) == 1
    with pytest.raises(UserError, match=r"members of its own \(_call_impl\) on 1"):
        VERIFIERS[verifier].decide(network, torch.tensor([[0.5]]), LABEL, 0.1, 1.0)


def test_a_deviation_below_0_that_was_loaded_turns_no_radius_around():
    head = linear([[1.0], [0.0]], [0.55, 0.0])
    network = nn.Sequential(Normalize([0.0], [1.0]), nn.Flatten(), head).eval()
    network.load_state_dict(network.state_dict() | {"0.std": -torch.ones(1, 1, 1)})
    assert_refuted(network, 0.5, 0.59, 0.1)


def test_what_a_deviation_below_0_rounds_is_no_less():
    layers = [Normalize([0.5], [0.3]).double() for _ in range(2)]
    layers[1].std.neg_()
    box = Interval(torch.full((1, 1, 1, 1), 0.5).double(), torch.ones(1, 1, 1, 1).double())
    assert rounding_error(layers[0], box).equal(rounding_error(layers[1], box))


def test_a_scale_that_underflows_is_not_multiplied_back():
    norm = nn.BatchNorm1d(1, eps=0.0)
    norm.weight.data.fill_(1e-30)
    norm.running_var.fill_(2.5e29)
    network = nn.Sequential(
        nn.Flatten(),
        linear([[1e38]], [0.0]),
        norm,
        linear([[1e7], [0.0]], [0.0, 1.2]),
    ).eval()
    assert_refuted(network, 0.9, 0.81, 0.1)


def test_a_scale_that_overflows_is_not_multiplied_back():
    norm = nn.BatchNorm1d(1, eps=0.0)
    norm.weight.data.fill_(1e30)
    norm.running_var.fill_(1e-20)
    norm.running_mean.fill_(-1e-35)
    first, last = linear([[1e-30]], [0.0]), linear([[-1e-10], [1e-10]], [2.0, 0.0])
    network = nn.Sequential(nn.Flatten(), first, norm, last).eval()
    assert network(torch.full((1, 1), 0.5)).tolist() == [[-math.inf, math.inf]]
    assert_refuted(network, 0.5, 0.5, 0.1)


def test_a_softplus_that_may_overflow_is_refused():
    softplus, x = nn.Softplus(threshold=200.0), torch.ones(1, 1)
    assert softplus(89 * x).item() == math.inf
    network = nn.Sequential(linear([[88.0]], [0.0]), softplus, linear([[-0.1], [1]], [150.0, 0]))
    with pytest.raises(UnsupportedLayer, match="up to a threshold above 80 it may overflow"):
        VERIFIERS["ibp"].decide(network, x, LABEL, 0.1, 1.0)
    network[1].threshold = 80
    VERIFIERS["ibp"].decide(network, x, LABEL, 0.1, 1.0)


@pytest.mark.parametrize("size", [[2, 2], (2,), [2], 2, (2, 2)])
def test_windows_are_taken_as_torch_takes_them(size):
    head = linear([[1.0], [0.0]], [0.0, 0.6])
    network = nn.Sequential(nn.AvgPool2d(size), nn.Flatten(), head)
    x = torch.tensor([[[[1.0, 0.9], [0.8, 0.7]]]])  # the mean is 0.85
    assert set(proofs(network, x, 0.2)) == set(VERIFIERS)
    assert proofs(network, x, 0.26) == []


@pytest.mark.parametrize(
    "reshaping",
    [
        (nn.Flatten(0), nn.Unflatten(0, (-1, 2))),
        (nn.Flatten(-2), nn.Unflatten(-1, (-1, 2))),
        (nn.Unflatten(0, (1, -1)), nn.Flatten(0, 1)),
        (nn.Unflatten(-2, (1, -1)), nn.Flatten(0, 1)),
    ],
)
def test_layers_that_mix_the_images_of_a_batch_are_refused(reshaping):
    network, x = nn.Sequential(*reshaping), torch.rand(2, 2)
    assert network(x).equal(x)
    for verifier in VERIFIERS.values():
        with pytest.raises(UnsupportedLayer, match="does not keep the images of a batch apart"):
            verifier.decide(network, x, LABEL.repeat(2), 0.1, 1.0)


def test_numbers_of_two_types_are_refused():
    double = ElementwiseAffine(torch.ones(2).double(), torch.zeros(2).double())
    network = nn.Sequential(nn.Linear(2, 2), double)
    found = r"found 0\.bias in torch\.float32 and 1\.shift in torch\.float64"
    for verifier in VERIFIERS.values():
        with pytest.raises(UserError, match=f"network: expected numbers of one type, {found}"):
            verifier.decide(network, torch.rand(1, 2), LABEL, 0.1, 1.0)


class Rounded(nn.Linear):
    """Of a weight that is rounded, which nobody counts."""

    def __init__(self, weight):
        super().__init__(len(weight[0]), len(weight), bias=False)
        del self.weight
        self.raw = nn.Parameter(torch.tensor(weight))

    @property
    def weight(self) -> Tensor:
        return (self.raw + 2.0**23) - 2.0**23


class OwnChain(nn.Sequential):
    """Runs layers that are no children of its, the last with a hook."""

    def __iter__(self):
        return iter([nn.Identity()])


def hooked_backward() -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    pool.register_full_backward_hook(lambda _, given, __: given)
    return nn.Sequential(pool, nn.Flatten())


def given(layer: nn.Module, name: str, value: object) -> nn.Module:
    setattr(layer, name, value)
    return layer


COMPUTING_ANYTHING = {
    "a property": (lambda: Rounded([[1.4, 0.0], [0.0, 0.6]]), r"members of its own \(weight\)"),
    "another iterator": (lambda: OwnChain(nn.ReLU()), r"members of its own \(__iter__\)"),
    "a hook for gradients": (hooked_backward, "hooks"),
    "a compiled call": (
        lambda: given(nn.ReLU(), "_compiled_call_impl", lambda x: -x),
        r"what \.compile\(\) made",
    ),
    "a tensor that is a number": (
        lambda: given(nn.LeakyReLU(), "negative_slope", torch.tensor(0.1).double()),
        r"tensors that are neither .* \(negative_slope\)",
    ),
    "a user's layer with another forward": (
        lambda: given(Halved(), "forward", lambda x: -x),
        r"members of its own \(forward\)",
    ),
}


@pytest.mark.usefixtures("rules_for_halved")
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("how", COMPUTING_ANYTHING)
def test_layers_that_may_compute_anything_are_refused(how, verifier):
    make, found = COMPUTING_ANYTHING[how]
    network = nn.Sequential(make()).eval()
    with pytest.raises(UserError, match=f"found {found}"):
        VERIFIERS[verifier].decide(network, torch.rand(1, 2), LABEL, 0.1, 1.0)


def test_what_computes_the_same_is_no_addition():
    class Mixin:
        __slots__ = ("note",)

    class Plain(Mixin, Generic[TypeVar("T")], nn.Linear):
        constant: int = 3

        @property
        def device(self) -> torch.device:
            return self.weight.device

        def reset_parameters(self) -> None:
            nn.init.eye_(self.weight)

        def helper(self) -> int:
            return 1

    layer, x = Plain(2, 2, bias=False), torch.tensor([[0.9, 0.1]])
    layer.seen, layer.seed, layer.huge = x.double(), 2**80 + 1, 10**400
    layer.far = -layer.huge
    network = nn.Sequential(layer)
    assert set(proofs(network, x, 0.1)) == set(VERIFIERS)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_hooks_for_all_modules_are_refused(verifier):
    network = nn.Sequential(nn.Linear(2, 2))
    handle = register_module_forward_hook(lambda module, _, output: 10 * output)
    try:
        with pytest.raises(UserError, match="certificates are without hooks for all modules"):
            VERIFIERS[verifier].decide(network, torch.rand(1, 2), LABEL, 0.1, 1.0)
    finally:
        handle.remove()


def test_rules_for_a_class_without_forward_are_for_any():
    class Mixin:
        pass

    class Third(Mixin, nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 3

    propagate.register(Mixin)(lambda _, box: Interval(box.center / 3, box.radius / 3))
    rounding_error.register(Mixin)(lambda _, box: 1e-3 * box.magnitude)
    assert bool(certified(nn.Sequential(Third()), torch.tensor([[0.9, 0.1]]), LABEL, 0.1))


def test_a_difference_that_overflows_before_it_is_divided_proves_nothing():
    wide = nn.Conv2d(1, 1, 1)
    wide.weight.data.fill_(1e38)
    wide.bias.data.zero_()
    layers = [wide, Normalize([-2.9e38], [1e38]), nn.Hardtanh(0.0, 4.0), nn.Flatten()]
    network = nn.Sequential(*layers, linear([[-1.0, 0.0], [0.0, 0.0]], [3.7, 0.0])).eval()
    x, nearby = torch.tensor([[[[0.45, 0.1]]]]), torch.tensor([[[[0.53, 0.1]]]])
    assert network(nearby).argmax(1) == 1
    assert proofs(network, x, 0.1) == []


def test_a_batch_norm_has_the_weight_that_its_forward_reads():
    norm = nn.BatchNorm1d(2)
    norm.weight.data.fill_(10.0)
    norm.affine = False
    network = nn.Sequential(norm).eval()
    assert network(torch.tensor([[0.46, 0.54]])).argmax(1) == 1
    assert proofs(network, torch.tensor([[0.6, 0.4]]), 0.15) == []


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, BatchNorm])
def test_a_variance_that_overflows_with_its_eps_proves_nothing(kind):
    norm = kind(2, eps=3e38)
    norm.running_var.copy_(torch.tensor([3e38, -1e38]))
    first = linear([[2.4e19, 0.0], [0.0, 1.4e19]], [0.0, 0.0])
    last = linear([[1.0, 1.0], [0.0, 0.0]], [0.0, 0.5])
    network = nn.Sequential(first, norm, nn.ReLU(), last).eval()
    assert network(torch.tensor([[0.4, 0.45]])).argmax(1) == 1
    assert proofs(network, torch.tensor([[0.5, 0.6]]), 0.2) == []


def test_a_batch_norm_without_a_bias_has_bounds():
    norm = nn.BatchNorm1d(2)
    norm.bias = None
    network = nn.Sequential(norm).eval()
    assert set(proofs(network, torch.tensor([[0.9, 0.1]]), 0.1)) == set(VERIFIERS)


@pytest.mark.parametrize("number", [np.longdouble(0.1), np.float64(0.1), 0.1, 2**24 + 1])
def test_numbers_of_any_type_are_as_float32_has_them(number):
    layer = given(nn.LeakyReLU(), "negative_slope", number)
    expected = torch.tensor(float(number), dtype=torch.float32).item()
    assert in_float64(layer).negative_slope == expected


def test_buffers_that_no_state_has_count_too():
    norm = nn.BatchNorm1d(2)
    del norm.running_var
    norm.register_buffer("running_var", torch.ones(2).half(), persistent=False)
    for verifier in VERIFIERS.values():
        with pytest.raises(UserError, match=r"running_var in torch\.float16"):
            verifier.decide(nn.Sequential(norm).eval(), torch.rand(1, 2), LABEL, 0.1, 1.0)


@pytest.mark.parametrize("beta", [0.0, math.inf, math.nan])
def test_a_softplus_that_is_no_number_somewhere_is_refused(beta):
    with pytest.raises(UnsupportedLayer, match="its beta is 0 or not finite"):
        certified(nn.Sequential(nn.Softplus(beta)), torch.rand(1, 2), LABEL, 0.1)


def test_a_radius_of_numpy_is_not_rounded_to_its_type():
    x = torch.tensor([[0.25, 0.5]])
    assert ball(x, np.float16(0.125)).radius.equal(ball(x, 0.125).radius)


def test_a_default_of_a_users_own_layer_may_be_another():
    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    @propagate.register
    def _(layer: Scaled, box: Interval) -> Interval:
        return Interval(layer.factor * box.center, layer.factor * box.radius)

    @rounding_error.register
    def _(layer: Scaled, box: Interval) -> Tensor:
        return 1e-3 * box.magnitude

    network = nn.Sequential(given(Scaled(), "factor", 2.0))
    assert bool(certified(network, torch.tensor([[0.9, 0.1]]), LABEL, 0.1))
