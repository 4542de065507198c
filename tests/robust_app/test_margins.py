import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.bounds import propagate
from robust_app.certificates import certified
from robust_app.interval import Interval
from robust_app.margins import margin_bounds
from tests.robust_app.networks import linear, points

ROUNDING = 1e-9  # all tests that compare to it run in float64

IMAGE = (2, 5, 4)


def random_network(seed, classes=3):
    """Three affine layers and one nested Sequential, of float64, for images (2, 5, 4)."""
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 16))
    return nn.Sequential(
        features, nn.Sequential(nn.ReLU(), nn.Linear(16, classes, bias=True))
    ).double()


def test_margins_of_a_linear_network_by_hand():
    network = linear([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.0, 0.0, -1.0])
    box = Interval(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5, 0.25]]))
    # z = (3, 1, 3); z0 - z1 = x1 - x2 is 2 -+ 0.75, z0 - z2 = 1 - x2 is 0 -+ 0.25.
    margins = margin_bounds(network, box, torch.tensor([0]))
    torch.testing.assert_close(margins, torch.tensor([[0.0, 1.25, -0.25]]))


@given(seed=st.integers(0, 1000), epsilon=st.floats(0, 0.5))
@settings(max_examples=20, deadline=None)
def test_merged_margins_are_those_of_each_pair_alone(seed, epsilon):
    network = random_network(seed)
    features, last = network[0], network[1][1]
    x = torch.rand(3, *IMAGE, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1])
    box = Interval.around(x, epsilon)
    with torch.no_grad():
        margins = margin_bounds(network, box, labels)
        hidden = propagate(nn.Sequential(features, nn.ReLU()), box)
        for i, y in enumerate(labels):
            for j in range(3):
                specification = last.weight[y] - last.weight[j]
                center = specification @ hidden.center[i] + last.bias[y] - last.bias[j]
                expected = center - specification.abs() @ hidden.radius[i]
                torch.testing.assert_close(margins[i, j], expected)


@given(seed=st.integers(0, 1000), epsilon=st.floats(0, 0.5))
@settings(max_examples=20, deadline=None)
def test_margins_are_sound_and_merging_never_loosens_them(seed, epsilon):
    network = random_network(seed)
    x = torch.rand(2, *IMAGE, dtype=torch.float64)
    labels = torch.tensor([0, 2])
    box = Interval.around(x, epsilon)
    with torch.no_grad():
        merged = margin_bounds(network, box, labels)
        unmerged = margin_bounds(nn.Sequential(network, nn.Identity()), box, labels)
        logits = propagate(network, box)
        at_label = logits.lower.gather(1, labels[:, None])
        by_definition = (at_label - logits.upper).scatter(1, labels[:, None], 0.0)
        torch.testing.assert_close(unmerged, by_definition)
        assert (merged >= unmerged - ROUNDING).all()
        for point in points(box):
            z = network(point)
            assert (z.gather(1, labels[:, None]) - z >= merged - ROUNDING).all()


def test_without_perturbation_the_margins_are_exact():
    network = random_network(0)
    x, labels = torch.rand(4, *IMAGE, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        logits = network(x)
        margins = margin_bounds(network, Interval.around(x, 0.0), labels)
    torch.testing.assert_close(margins, logits.gather(1, labels[:, None]) - logits)
    assert (margins.gather(1, labels[:, None]) == 0).all()


def test_margins_have_the_gradients_of_finite_differences():
    network = random_network(5)
    parameters = tuple(p.detach().requires_grad_() for p in network.parameters())
    names = [name for name, _ in network.named_parameters()]
    x, labels = torch.rand(2, *IMAGE, dtype=torch.float64), torch.tensor([1, 2])

    class Margins(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return margin_bounds(self.network, Interval.around(x, 0.1), labels)

    def margins(*values):
        by_name = {f"network.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Margins(), by_name, (x,))

    assert torch.autograd.gradcheck(margins, parameters, fast_mode=True)


@pytest.mark.parametrize(
    ("network", "labels", "shapes"),
    [
        (nn.Identity(), torch.tensor([0]), r"\(1, 2, 5, 4\) and \(1,\)"),
        (nn.Linear(4, 3), torch.tensor([0]), r"\(1, 2, 5, 3\) and \(1,\)"),
        (nn.Flatten(), torch.tensor([[0]]), r"\(1, 40\) and \(1, 1\)"),
        (nn.Flatten(), torch.tensor([0, 1]), r"\(1, 40\) and \(2,\)"),
    ],
)
def test_margins_of_what_is_no_classifier_are_refused(network, labels, shapes):
    with pytest.raises(ValueError, match=shapes):
        margin_bounds(network, Interval(torch.zeros(1, *IMAGE), torch.ones(1, *IMAGE)), labels)


# --- certified


def test_certified_up_to_the_distance_of_the_decision_boundary():
    network = linear([[1.0, -1.0], [-1.0, 1.0]], [0.0, 0.0])
    x = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])
    labels = torch.tensor([0, 1, 0])
    # z0 - z1 = 2 (x1 - x2) is 1 at the first image and falls by 4 epsilon.
    assert certified(network, x, labels, 0.24).tolist() == [True, False, False]
    assert certified(network, x, labels, 0.25).tolist() == [False, False, False]
    assert certified(network, x, labels, 0.0).tolist() == [True, False, False]


def test_certified_knows_that_pixels_end_at_0_and_1():
    network = linear([[1.0, -1.0], [0.0, 0.0]], [0.5, 0.0])
    # z0 - z1 = x1 - x2 + 0.5: epsilon = 0.4 takes 0.8 from it, within [0, 1] only 0.4.
    assert certified(network, torch.tensor([[0.0, 0.0]]), torch.tensor([0]), 0.4).item()


def test_nothing_is_certified_by_a_network_that_is_not_finite():
    network = linear([[math.nan], [0.0]], [0.0, 0.0])
    assert not certified(network, torch.tensor([[0.5]]), torch.tensor([0]), 0.0).item()
