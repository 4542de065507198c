import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.interval import Interval
from robust_app.layers import Normalize
from robust_app.margins import layer_inputs
from robust_app.models import build
from robust_app.regularizers import regularization, relu_balance, tightness

TERMS = {"tightness": tightness, "balance": relu_balance, "both": regularization}


def box(center, radius):
    center = torch.tensor([center], dtype=torch.float64)
    return Interval(center, torch.full_like(center, radius))


def relu(center, radius):
    return (nn.ReLU(), box(center, radius))


INPUT = (nn.Linear(1, 1), box([0.5], 0.1))


def test_tightness_by_hand():
    # r₀/r: 0.1/0.8 = 1/8, a quarter of τ; 0.1/0.4 = 1/4, half of τ; 0.1/0.15 is above τ
    inputs = [INPUT, relu([0], 0.8), (nn.Linear(1, 1), box([0], 9)), relu([0], 0.4)]
    torch.testing.assert_close(tightness(inputs).item(), (3 / 4 + 1 / 2) / 2)
    torch.testing.assert_close(
        tightness([*inputs, relu([0], 0.15)]).item(), (3 / 4 + 1 / 2 + 0) / 3
    )


def test_tightness_is_of_mean_radii():
    uneven = Interval(torch.zeros(2, 2), torch.tensor([[0.1, 0.3], [0.5, 0.7]]))  # mean 0.4
    assert tightness([INPUT, (nn.ReLU(), uneven)]).item() == pytest.approx(1 / 2)


def test_tightness_is_relative_to_the_normalised_input():
    normalize = Normalize([0.5], [0.25])
    pixels, normalised = box([0.5], 0.025), box([0], 0.1)
    inputs = [(normalize, pixels), (nn.Linear(1, 1), normalised), relu([0], 0.8)]
    assert tightness(inputs).item() == pytest.approx(3 / 4)


def test_boxes_of_one_point_are_tight():
    point = (nn.Linear(1, 1), box([0.5], 0))
    assert tightness([point, relu([0], 0)]) == 0
    assert tightness([INPUT, relu([0], 0)]) == 0
    assert tightness([point, relu([0], 0.1)]) == 1


def test_balance_by_hand():
    # active 3 and 1, inactive -8, -12; 0.5 and -0.5 are neither. Mean centre -16/6.
    centers = [3.0, 1.0, -8.0, -12.0, 0.5, -0.5]
    mean = -16 / 6
    of_centers = (3 + 1) / (8 + 12)
    of_deviations = ((3 - mean) ** 2 + (1 - mean) ** 2) / ((-8 - mean) ** 2 + (-12 - mean) ** 2)
    assert of_deviations < 0.5
    expected = (0.5 - of_centers) / 0.5 + (0.5 - of_deviations) / 0.5
    assert relu_balance([relu(centers, 0.6)]).item() == pytest.approx(expected)
    # inverted where above 1
    mirrored = relu([-center for center in centers], 0.6)
    assert relu_balance([mirrored]).item() == pytest.approx(expected)
    # mean over layers, of which a balanced one adds nothing
    assert relu_balance([mirrored, relu([2, -2], 0.1)]).item() == pytest.approx(expected / 2)


@pytest.mark.parametrize(
    ("centers", "expected"),
    [
        ([1.0, 2.0], 2.0),  # none inactive
        ([-1.0, -2.0], 2.0),  # none active
        ([0.1, -0.2], 0.0),  # neither
        ([0.0, 0.0], 0.0),
    ],
)
def test_a_missing_kind_of_neuron_is_as_unbalanced_as_can_be_and_two_are_not(centers, expected):
    assert relu_balance([relu(centers, 0.5)]).item() == expected


def test_the_sum_takes_an_iterator():
    pairs = [INPUT, relu([3.0, 1.0, -8.0], 0.6)]
    assert regularization(iter(pairs)) == tightness(pairs) + relu_balance(pairs)


@pytest.mark.parametrize("term", TERMS)
def test_a_network_without_relu_is_refused(term):
    with pytest.raises(ValueError, match="before a ReLU layer, found none"):
        TERMS[term]([INPUT])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("term", TERMS)
def test_gradients_are_those_of_finite_differences(term, scale):
    # Both ratios of the balance are below τ, and so is that of the radii.
    generator = torch.Generator().manual_seed(0)
    center = torch.tensor([[3.0, 1.0, -8.0], [-12.0, 0.5, -0.5]], dtype=torch.float64)
    radius = 0.6 + 0.2 * torch.rand(2, 3, generator=generator, dtype=torch.float64)
    first = torch.full((1, 1), 0.1, dtype=torch.float64)
    arguments = [(scale * leaf).requires_grad_() for leaf in (first, center, radius)]

    def value(first, center, radius):
        inputs = [
            (nn.Linear(1, 1), Interval(torch.zeros_like(first), first)),
            (nn.ReLU(), Interval(center, radius)),
        ]
        return TERMS[term](inputs)

    assert 0 < value(*arguments) < 2
    assert torch.autograd.gradcheck(value, arguments, eps=1e-6 * scale, atol=1e-6 / scale)


EXTREMES = [0.0, 1e-42, 1e-30, 1e-12, 1.0, 1e12, 1e30]


@settings(max_examples=200)
@given(
    center=st.lists(
        st.tuples(st.sampled_from(EXTREMES), st.sampled_from([-1, 1])), min_size=1, max_size=4
    ),
    radius=st.sampled_from(EXTREMES),
    first=st.sampled_from(EXTREMES),
)
def test_never_nan_nor_infinite(center, radius, first):
    center = torch.tensor([[value * sign for value, sign in center]], requires_grad=True)
    radius = torch.full_like(center, radius, requires_grad=True)
    first = torch.full((1, 1), first, requires_grad=True)
    inputs = [
        (nn.Linear(1, 1), Interval(torch.zeros(1, 1), first)),
        (nn.ReLU(), Interval(center, radius)),
    ]
    value = regularization(inputs)
    assert 0 <= value <= 3
    value.backward()
    for leaf in (center, radius, first):
        assert leaf.grad is None or leaf.grad.isfinite().all()


def test_a_step_against_the_gradient_lowers_it():
    torch.manual_seed(0)
    network = build("digits-cnn", (1, 8, 8), 10)
    x = Interval.around(torch.rand(8, 1, 8, 8), 0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    values = []
    for _ in range(5):
        value = regularization(layer_inputs(network, x))
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]
