import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app import crown, tightening
from robust_app.attacks import falsified
from robust_app.certificates import certified
from robust_app.crown_margins import crown_ibp_margins, crown_margins
from robust_app.interval import Interval
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import Normalize, Residual
from robust_app.margins import margin_bounds
from robust_app.pullback import LinearBound
from robust_app.relaxation import adaptive_slopes, is_relu, lower_bounds
from robust_app.slopes import ascended
from robust_app.tightening import Problem, optimize, relax, tighten

IMAGE, CLASSES = (2, 6, 5), 4
LABELS = torch.tensor([0, 3, 1])
SEEDS = st.integers(0, 10_000)


def random_network(seed):
    """All kinds of layers, with activations on both sides of 0, in float64 and evaluation mode."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        Normalize([0.5, 0.4], [0.3, 0.2]),
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 2, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2, 1)),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    ).double()
    norm = network[2]
    nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    return network.eval()


def problem(seed, epsilon):
    network = random_network(seed)
    x = torch.rand(len(LABELS), *IMAGE, dtype=torch.float64)
    box = Interval.around(x, epsilon)
    with torch.no_grad():
        return network, x, box, Problem.of(network, box, LABELS)


def points(box, count=8):
    for _ in range(count):
        direction = 2 * torch.rand_like(box.center) - 1
        yield box.center + box.radius * direction
        yield box.center + box.radius * direction.sign()


def linear_tightness(trace, slopes):
    outputs = torch.eye(CLASSES, dtype=torch.float64)
    specification = outputs[LABELS].unsqueeze(1) - outputs
    bound = LinearBound(specification, torch.zeros(specification.shape[:2], dtype=torch.float64))
    return lower_bounds(trace, bound, slopes=slopes)


# --- margins


@given(seed=SEEDS, epsilon=st.floats(0, 0.3))
@settings(max_examples=20)
def test_all_margins_and_boxes_hold_the_points_of_the_ball(seed, epsilon):
    network, _, box, start = problem(seed, epsilon)
    with torch.no_grad():
        tight = tighten(relax(start))
        stages = [start, relax(start), tight, relax(tight), optimize(tight)]
        bounds = [stage.margins for stage in stages] + [crown_ibp_margins(network, box, LABELS)]
        for x in points(box):
            value = x
            for layer, inside in tight.trace:
                assert (value >= inside.lower - 1e-9).all()
                assert (value <= inside.upper + 1e-9).all()
                value = layer(value)
            margins = value.gather(1, LABELS[:, None]) - value
            for bound in bounds:
                others = bound.scatter(1, LABELS[:, None], 0.0)
                assert (margins >= others - 1e-9).all()


def test_without_perturbation_the_margins_are_exact():
    network, x, box, start = problem(0, 0.0)
    with torch.no_grad():
        logits = network(x)
        expected = logits.gather(1, LABELS[:, None]) - logits
        torch.testing.assert_close(crown_ibp_margins(network, box, LABELS), expected)
        assert torch.equal(tighten(start).proved, start.proved)


@given(seed=SEEDS)
@settings(max_examples=10)
def test_affine_layers_cost_nothing(seed):
    """Of affine layers alone the margins are exact; those of intervals only for one layer."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 9), nn.Linear(9, CLASSES)).double()
    weight = network[2].weight @ network[1].weight
    box = Interval.around(torch.rand(3, *IMAGE, dtype=torch.float64), 0.2)
    with torch.no_grad():
        logits = network(box.center)
        differences = weight[LABELS].unsqueeze(1) - weight
        radius = (differences.abs() @ box.radius.flatten(1).unsqueeze(2)).squeeze(2)
        expected = logits.gather(1, LABELS[:, None]) - logits - radius
        torch.testing.assert_close(crown_ibp_margins(network, box, LABELS), expected)
        assert (expected >= margin_bounds(network, box, LABELS) - 1e-9).all()


@given(seed=SEEDS, epsilon=st.floats(0, 0.3))
@settings(max_examples=20)
def test_with_lower_slopes_of_0_never_looser_than_intervals(seed, epsilon):
    """Each line, least on its own box, gives the interval's bound; together they give no less."""
    _, _, _, start = problem(seed, epsilon)
    zeros = [torch.zeros_like(box.center) for layer, box in start.trace if is_relu(layer)]
    with torch.no_grad():
        found = linear_tightness(start.trace, zeros)
    margins = start.margins.scatter(1, LABELS[:, None], 0.0)
    assert (found >= margins - 1e-9).all()


def test_with_adaptive_slopes_it_can_be_looser_than_intervals():
    # h = ReLU(x - 0.2) in [0, 0.4] has the lower line x - 0.2, which is -0.2 at x = 0.
    network = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    for parameter, value in zip(
        network.parameters(), [1.0, -0.2, [[1.0], [0.0]], 0.0], strict=True
    ):
        parameter.data.copy_(torch.tensor(value).expand_as(parameter))
    box = Interval.between(torch.tensor([[0.0]]), torch.tensor([[0.6]]))
    label = torch.tensor([0])
    with torch.no_grad():
        torch.testing.assert_close(margin_bounds(network, box, label), torch.zeros(1, 2))
        expected = torch.tensor([[0.0, -0.2]])
        torch.testing.assert_close(crown_ibp_margins(network, box, label), expected)


def test_tighter_on_average_than_what_went_before():
    """Over many networks: no theorem, as a tighter box can change a slope for the worse."""
    gains = []
    for seed in range(10):
        network, _, box, start = problem(seed, 0.1)
        with torch.no_grad():
            ibp = margin_bounds(network, box, LABELS)
            crown_ibp = crown_margins(start.trace, LABELS)
            full = crown_margins(tighten(start).trace, LABELS)
        gains.append(torch.stack([(crown_ibp - ibp).mean(), (full - crown_ibp).mean()]))
    assert (torch.stack(gains).mean(0) > 0.05).all()


def test_margins_have_the_gradients_of_finite_differences():
    network, _, box, _ = problem(3, 0.1)
    parameters = dict(network.named_parameters())

    class Margins(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self):
            return crown_ibp_margins(self.network, box, LABELS)

    def margins(*values):
        by_name = {f"network.{n}": v for n, v in zip(parameters, values, strict=True)}
        return torch.func.functional_call(Margins(), by_name, ())

    values = tuple(p.detach().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(margins, values, fast_mode=True)


def test_gradients_are_finite_where_bounds_are_0():
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    nn.init.zeros_(network[0].weight)
    crown_ibp_margins(
        network, Interval.around(torch.ones(1, 2), 0.1), torch.tensor([0])
    ).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("network", "labels", "shapes"),
    [
        (nn.Identity(), torch.tensor([0]), r"\(1, 2, 6, 5\) and \(1,\)"),
        (nn.Flatten(), torch.tensor([[0]]), r"\(1, 60\) and \(1, 1\)"),
        (nn.Flatten(), torch.tensor([0, 1]), r"\(1, 60\) and \(2,\)"),
    ],
)
def test_margins_of_what_is_no_classifier_are_refused(network, labels, shapes):
    with pytest.raises(ValueError, match=shapes):
        crown_ibp_margins(network, Interval(torch.zeros(1, *IMAGE), torch.ones(1, *IMAGE)), labels)


# --- stages


@given(seed=SEEDS, epsilon=st.floats(0.01, 0.3))
@settings(max_examples=15)
def test_tightened_boxes_lie_within_those_of_intervals(seed, epsilon):
    _, _, _, start = problem(seed, epsilon)
    with torch.no_grad():
        tight = tighten(start)
    for (_, inner), (_, outer) in zip(tight.trace, start.trace, strict=True):
        assert (inner.radius >= 0).all()
        assert (inner.lower >= outer.lower - 1e-9).all()
        assert (inner.upper <= outer.upper + 1e-9).all()
    assert (tight.margins >= start.margins).all()
    assert (tight.margins > start.margins).any()
    assert tight.trace[-1][1].radius.sum() < start.trace[-1][1].radius.sum()


@given(seed=SEEDS, epsilon=st.floats(0.01, 0.3))
@settings(max_examples=15)
def test_optimised_slopes_are_never_looser_than_the_start(seed, epsilon):
    _, _, _, start = problem(seed, epsilon)
    images = torch.tensor([0, 2, 2, 1])
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(4, 1, CLASSES, generator=generator, dtype=torch.float64)
    bound = LinearBound(coefficients, torch.zeros(4, 1, dtype=torch.float64))
    with torch.no_grad():
        first = lower_bounds(start.trace, bound, images)
        best = ascended(start.trace, bound, images)
    assert (best >= first - 1e-9).all()
    assert not best.requires_grad
    assert (best > first + 1e-6).any() or (first > 0).all() or epsilon < 0.05


def test_optimised_slopes_reach_the_best_of_a_grid():
    _, _, _, start = problem(4, 0.1)
    boxes = [box for layer, box in start.trace if is_relu(layer)]
    with torch.no_grad():
        grid = [
            linear_tightness(start.trace, [torch.full_like(b.center, a) for b in boxes])
            for a in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        grid.append(linear_tightness(start.trace, [adaptive_slopes(b) for b in boxes]))
        found = optimize(start).margins
    best = torch.stack(grid).amax(0).scatter(1, LABELS[:, None], -torch.inf)
    assert (found[best < 0] >= best[best < 0]).all()


# --- verifiers

VERIFIERS = [crown.crown_ibp, crown.alpha_crown_ibp, crown.crown, crown.alpha_crown]


@given(seed=SEEDS, epsilon=st.floats(0, 0.2))
@settings(max_examples=15)
def test_verifiers_prove_more_and_more_and_never_what_is_false(seed, epsilon):
    network, x, _, _ = problem(seed, epsilon)
    labels = network(x).argmax(1)
    ibp = certified(network, x, labels, epsilon)
    crown_ibp, alpha_crown_ibp, full, alpha_crown = (
        f(network, x, labels, epsilon) for f in VERIFIERS
    )
    for looser, tighter in [
        (ibp, crown_ibp),
        (crown_ibp, alpha_crown_ibp),
        (crown_ibp, full),
        (alpha_crown_ibp, alpha_crown),
        (full, alpha_crown),
    ]:
        assert (looser <= tighter).all()
    generator = torch.Generator().manual_seed(0)
    broken = falsified(network, x, labels, epsilon, steps=5, restarts=1, generator=generator)
    assert not (broken & alpha_crown).any()


def test_each_verifier_proves_what_the_cheaper_do_not():
    counts = torch.zeros(5, dtype=torch.int64)
    for seed in range(8):
        network = random_network(seed)
        x = torch.rand(20, *IMAGE, dtype=torch.float64)
        labels = network(x).argmax(1)
        for i, verifier in enumerate([certified, *VERIFIERS]):
            counts[i] += verifier(network, x, labels, 0.07).sum()
    ibp, crown_ibp, alpha_crown_ibp, full, alpha_crown = counts.tolist()
    assert ibp < crown_ibp < alpha_crown_ibp < alpha_crown
    assert crown_ibp < full < alpha_crown


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_the_batch_may_be_of_any_size(verifier, monkeypatch):
    network = random_network(1)
    x = torch.rand(12, *IMAGE, dtype=torch.float64)
    labels = network(x).argmax(1).index_fill(0, torch.tensor([5]), 0)
    together = verifier(network, x, labels, 0.03)
    monkeypatch.setattr(tightening, "ELEMENTS", 1)
    assert torch.equal(verifier(network, x, labels, 0.03), together)
    assert verifier(network, x[:0], labels[:0], 0.03).shape == (0,)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_misclassified_images_are_not_proved(verifier):
    network = random_network(2)
    x = torch.rand(6, *IMAGE, dtype=torch.float64)
    labels = (network(x).argmax(1) + 1) % CLASSES
    assert not verifier(network, x, labels, 0.0).any()


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("layer", [Residual(nn.Identity()), nn.MaxPool2d(1), nn.Sigmoid()])
def test_layers_that_only_intervals_know_are_refused(verifier, layer):
    network = nn.Sequential(layer, nn.Flatten())
    x = torch.rand(1, 1, 1, 2)
    with pytest.raises(UnsupportedLayer, match=type(layer).__name__):
        verifier(network, x, network(x).argmax(1), 0.0)


@pytest.mark.parametrize("verifier", [crown.crown_ibp, crown.alpha_crown_ibp, crown.alpha_crown])
def test_a_network_without_a_relu_is_verified_too(verifier):
    x, labels = torch.tensor([[0.8, 0.4], [0.55, 0.45]]), torch.tensor([0, 0])
    assert verifier(nn.Identity(), x, labels, 0.1).tolist() == [True, False]
