"""Networks that were certified once, each with the image of the ball that shows it wrong."""

import contextlib
import math

import pytest
import torch
from torch import Tensor, nn

from robust_app.bounds import propagate
from robust_app.certificates import certified
from robust_app.errors import UserError
from robust_app.evaluation import evaluate, misclassified, standard_and_certified
from robust_app.exact import decide
from robust_app.interval import Interval
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import ElementwiseAffine, Normalize, Residual, applied
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
    with pytest.raises(UnsupportedLayer, match="it was given a forward or __call__ of its own"):
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


@pytest.mark.parametrize("verifier", ["ibp", "crown-ibp"])
def test_a_softplus_that_may_overflow_is_refused(verifier):
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
