import itertools
import sys

import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from robust_app import crown, exact, rounding
from robust_app.attacks import falsified
from robust_app.certificates import ENDS, ball, certified, computed_margins, enclosures
from robust_app.errors import UserError
from robust_app.exact import Verdict, decide, decided
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import Residual
from tests.robust_app.networks import linear


def dense_network(seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)]
    network = nn.Sequential(*layers).double()
    for layer in network[::2]:
        nn.init.normal_(layer.weight)
    return network


def least_margin(network, x, label, epsilon):
    """The smallest z_y - z_j over the ball: a linear program for each pattern of activations."""
    weights = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in network[::2]
    ]
    ball = list(
        zip((x - epsilon).clamp(0, 1).tolist(), (x + epsilon).clamp(0, 1).tolist(), strict=True)
    )
    least = float("inf")
    for pattern in itertools.product([0.0, 1.0], repeat=7):
        first, second = torch.tensor(pattern[:4]).numpy(), torch.tensor(pattern[4:]).numpy()
        (w1, b1), (w2, b2), (w3, b3) = weights
        m2, c2 = w2 @ (first[:, None] * w1), w2 @ (first * b1) + b2
        m3, c3 = w3 @ (second[:, None] * m2), w3 @ (second * c2) + b3
        signs = [*(1 - 2 * first), *(1 - 2 * second)]  # -1 for z >= 0, 1 for z <= 0
        sides = [s * row for s, row in zip(signs, [*w1, *m2], strict=True)]
        limits = [-s * c for s, c in zip(signs, [*b1, *c2], strict=True)]
        for j in {0, 1, 2} - {label}:
            result = linprog(m3[label] - m3[j], A_ub=sides, b_ub=limits, bounds=ball)
            if result.status == 0:
                least = min(least, result.fun + c3[label] - c3[j])
    return least


def assert_counterexample(network, x, label, epsilon, found):
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert (found >= (x - epsilon).clamp(0, 1)).all()
    assert (found <= (x + epsilon).clamp(0, 1)).all()
    assert network(found.unsqueeze(0)).argmax(1).item() != label


def with_least_margin(margin, seed):
    """A network, an image and its class; its last bias so that the least margin is as given."""
    network, epsilon = dense_network(seed), 0.3
    x = torch.rand(3, dtype=torch.float64)
    label = network(x.unsqueeze(0)).argmax(1)
    network[-1].bias.data[label] += margin - least_margin(network, x, label.item(), epsilon)
    return network, x, label, epsilon


@pytest.mark.parametrize("margin", [0.02, -0.02])
def test_the_answer_is_that_of_all_patterns_of_activations(margin):
    beyond_bounds = 0
    for seed in range(5):
        network, x, label, epsilon = with_least_margin(margin, seed)
        decision = decide(network, x, label.item(), epsilon, time_limit=60.0)
        beyond_bounds += not crown.alpha_crown(network, x[None], label, epsilon).item()
        if margin > 0:
            assert decision == (Verdict.CERTIFIED, None)
        else:
            assert decision.verdict is Verdict.FALSIFIED
            assert_counterexample(network, x, label.item(), epsilon, decision.counterexample)
    assert beyond_bounds >= 1


def test_a_margin_within_what_the_solver_lets_pass_is_left_open(monkeypatch):
    """With networks that round nothing, so that only the solver's tolerance is in the way."""
    monkeypatch.setitem(rounding.UNITS, torch.float64, 0.0)
    left_open = 0
    for seed in range(8):
        network, x, label, epsilon = with_least_margin(7e-7, seed)
        proved = crown.alpha_crown(network, x[None], label, epsilon).item()
        decision = decide(network, x, label.item(), epsilon, time_limit=60.0)
        assert decision.verdict is (Verdict.CERTIFIED if proved else Verdict.UNDECIDED)
        left_open += not proved
    assert left_open >= 1


def open_network(slope):
    """Margin 0.1 - slope ReLU(x1 + x2 - 1.5), and terms that cancel, which no bound here sees.

    In the middle of [0, 1]² gradients are 0, which leaves attacks where they start.
    """
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    values = (
        [[1.0, -1.0], [2.0, -2.0], [1.0, 1.0]],
        [0.0, 0.0, -1.5],
        [[1.0, -0.5, -slope], [0.0, 0.0, 0.0]],
        [0.1, 0.0],
    )
    for parameter, value in zip(network.parameters(), values, strict=True):
        parameter.data.copy_(torch.tensor(value))
    return network


MIDDLE = torch.tensor([0.5, 0.5])


def test_what_bounds_and_attacks_leave_open():
    harmless, harmful = open_network(slope=0.1), open_network(slope=1.0)
    label = torch.tensor([0])
    assert not crown.alpha_crown(harmless, MIDDLE[None], label, 0.5).item()
    assert decide(harmless, MIDDLE, 0, 0.5, time_limit=60.0) == (Verdict.CERTIFIED, None)
    decision = decide(harmful, MIDDLE, 0, 0.5, time_limit=60.0)
    assert decision.verdict is Verdict.FALSIFIED
    assert_counterexample(harmful, MIDDLE, 0, 0.5, decision.counterexample)


def test_without_time_left_the_answer_is_open():
    decision = decide(open_network(slope=0.1), MIDDLE, 0, 0.5, time_limit=0.0)
    assert decision == (Verdict.UNDECIDED, None)


def conv_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 2),
        nn.ReLU(),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(3, 3),
    ).eval()


def test_the_answer_lies_between_attack_and_bounds():
    """Images in float32, and all kinds of layers; a count so that no group is empty."""
    counts = torch.zeros(4, dtype=torch.int64)
    for seed in range(6):
        network, epsilon = conv_network(seed), 0.1
        nn.init.normal_(network[-1].weight)
        x = torch.rand(4, 1, 5, 5)
        labels = network(x).argmax(1)
        proved, broken = decided(network, x, labels, epsilon, time_limit=60.0)
        generator = torch.Generator().manual_seed(0)
        attacked = falsified(network, x, labels, epsilon, steps=20, restarts=2, generator=generator)
        bounded = crown.alpha_crown(network, x, labels, epsilon)
        assert (bounded <= proved).all()
        assert not (attacked & proved).any()
        assert not (proved & broken).any()
        assert (proved | broken).all()
        counts += torch.stack(
            [g.sum() for g in (certified(network, x, labels, epsilon), bounded, proved, broken)]
        )
    assert 0 < counts[0] <= counts[1] <= counts[2]
    assert counts[3] > 0


def test_a_misclassified_image_is_its_own_counterexample():
    x = torch.tensor([0.2, 0.6])
    decision = decide(nn.Identity(), x, 0, 0.0, time_limit=1.0)
    assert decision.verdict is Verdict.FALSIFIED
    assert torch.equal(decision.counterexample, x)


@pytest.mark.parametrize("layer", [Residual(nn.Identity()), nn.Sigmoid()])
def test_layers_without_a_relaxation_are_refused(layer):
    with pytest.raises(UnsupportedLayer, match=type(layer).__name__):
        decide(layer, torch.tensor([0.9, 0.2]), 0, 0.5, time_limit=1.0)


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match=r"pip install scipy"):
        decide(open_network(slope=0.1), MIDDLE, 0, 0.5, time_limit=60.0)


def test_a_network_that_overflows_in_one_neuron_is_left_open():
    network = linear([[1.0], [1.0]], [0.0, 0.0]).double()
    network.weight.data[0] = network.bias.data[0] = 1.7e308
    network = nn.Sequential(network, nn.ReLU())
    decision = decide(network, torch.tensor([0.5], dtype=torch.float64), 0, 0.5, time_limit=60.0)
    assert decision == (Verdict.UNDECIDED, None)


LARGE = 2.0**16
"""Of this size float32 rounds by more than the solver lets pass."""


def chain_of_roundings(sign, shift, constant):
    """Margin sign · ReLU(x - 0.5 + shift) + constant, through numbers that are about LARGE."""
    network = nn.Sequential(
        linear([[1.0]], [LARGE]),
        nn.ReLU(),
        linear([[1.0]], [-LARGE - 0.5]),
        nn.ReLU(),
        linear([[1.0]], [LARGE]),
        linear([[float(sign)], [0.0]], [-LARGE * sign, 0.0]),
    ).double()
    with torch.no_grad():
        network[2].bias += shift
        network[5].bias[0] += constant
    return network


def roundings_of(network, x, epsilon):
    """What the layers before the open ReLU may lose, and those after it."""
    _, first, _, second, _, last = enclosures(network, ball(x, epsilon))
    _, errors = computed_margins(*last, torch.tensor([0]))
    last_error = errors[0, 1]
    return (first[1].error + second[1].error).item(), (last[1].error + last_error).item()


@pytest.mark.parametrize("sign", [-1, 1])
def test_what_rounding_may_take_is_not_certified(sign):
    """In real numbers all margins are above 0; rounding may take a ninth more than there is."""
    x, label, epsilon = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0]), 0.01
    radius = epsilon + ENDS
    with torch.no_grad():
        before, after = roundings_of(chain_of_roundings(sign, 0.0, 0.0), x, epsilon)
    assert min(before, after) > 1e-4  # more than the tolerance of the solver
    for share, expected in [(0.9, Verdict.UNDECIDED), (1.1, Verdict.CERTIFIED)]:
        if sign < 0:  # c - ReLU(z), z to radius
            network = chain_of_roundings(sign, 0.0, radius + share * (before + after))
        else:  # ReLU(z) + c, z from half of what may be lost, so that all of it may be
            network = chain_of_roundings(sign, radius + before / 2, share * after)
        proved = crown.alpha_crown(network, x, label, epsilon).item()
        assert decide(network, x[0], 0, epsilon, time_limit=60.0).verdict is expected
        assert proved <= (expected is Verdict.CERTIFIED)


def tent(scale):
    """A margin of 1.5 - 100 |x - 0.375| for class 1 against 0, by hidden values of any size."""
    network = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        network[0].weight.copy_(scale * torch.ones(3, 1))
        network[0].bias.copy_(scale * torch.tensor([-0.35, -0.375, -0.4]))
        network[2].weight.copy_(torch.tensor([[0.0, 0, 0], [100.0, -200.0, 100.0]]) / scale)
        network[2].bias.copy_(torch.tensor([1.0, 0.0]))
    return network


@pytest.mark.parametrize("scale", [2.0**exponent for exponent in (-40, -34, -30, 0, 20, 30, 40)])
def test_the_size_of_hidden_values_does_not_count(scale):
    """The solver's tolerances are absolute: what is narrower it would take for nothing."""
    network = tent(scale)
    counterexample = torch.tensor([0.375])
    assert network(counterexample.unsqueeze(0)).argmax(1) == 1
    decision = decide(network, torch.tensor([0.5]), 0, 0.2, time_limit=60.0)
    assert decision.verdict is Verdict.FALSIFIED
    assert_counterexample(network, torch.tensor([0.5]), 0, 0.2, decision.counterexample)
    beside = decide(network, torch.tensor([0.7]), 0, 0.2, time_limit=60.0)
    assert beside.verdict is Verdict.CERTIFIED


@pytest.mark.parametrize("exponent", [-40, -30, 30, 40])
def test_random_networks_have_the_verdicts_of_any_size(exponent, monkeypatch):
    """What the program alone says: no attack finds anything."""
    monkeypatch.setattr(exact, "_misclassified_near", lambda *_: None)
    verdicts = {False: [], True: []}
    for seed, scaled in itertools.product(range(12), (False, True)):
        network = dense_network(seed)
        x = torch.rand(3, dtype=torch.float64)
        label = network(x.unsqueeze(0)).argmax(1).item()
        if scaled:
            with torch.no_grad():
                network[0].weight *= 2.0**exponent
                network[0].bias *= 2.0**exponent
                network[2].bias *= 2.0**exponent
                network[4].weight /= 2.0**exponent
        verdicts[scaled].append(decide(network, x, label, 0.3, time_limit=60.0).verdict)
    assert verdicts[True] == verdicts[False]
    assert set(verdicts[False]) == {Verdict.CERTIFIED, Verdict.UNDECIDED}


@pytest.mark.parametrize("epsilon", [1e-7, 1e-46, 1e-50])
def test_a_ball_too_narrow_for_the_solver_is_not_asked_about(epsilon):
    x = torch.tensor([0.2, 0.7, 0.1])
    assert decide(nn.Identity(), x, 1, epsilon, time_limit=5.0).verdict is Verdict.CERTIFIED
    level = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():  # margins of |x - ½| - that, which intervals and lines do not prove
        level[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        level[0].bias.copy_(torch.tensor([-0.5, 0.5]))
        level[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        level[2].bias.copy_(torch.tensor([0.0, -1e-12]))
    x = torch.tensor([0.5], dtype=torch.float64)
    assert decide(level, x, 0, epsilon, time_limit=5.0).verdict is not Verdict.FALSIFIED
