import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app.interval import Computed, Interval
from robust_app.layer_rules import UnsupportedLayer
from robust_app.margins import layer_inputs
from robust_app.pullback import LinearBound, inner_products
from robust_app.relaxation import adaptive_slopes, before_rounding, lower_bounds, relax_relu
from tests.robust_app.networks import linear


@pytest.mark.parametrize(("slope", "expected"), [(0.0, -1.5), (0.5, -2.0), (1.0, -2.5)])
def test_two_layers_by_hand(slope, expected):
    network = nn.Sequential(
        linear([[1.0, -1.0], [2.0, 1.0]], [0.0, -3.0]), nn.ReLU(), linear([[1.0, -2.0]], [0.5])
    )
    box = Interval.between(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    # z1 = x1 - x2 in [-2, 1], z2 = 2 x1 + x2 - 3 in [-3, 1]: h1 >= a z1, h2 <= (z2 + 3) / 4, so
    # h1 - 2 h2 + 0.5 >= (a - 1) x1 - (a + 0.5) x2 + 0.5, which is -a - 1.5 at (1, 2).
    bound = LinearBound(torch.ones(1, 1, 1), torch.zeros(1, 1))
    trace = list(layer_inputs(network, box))
    found = lower_bounds(trace, bound, slopes=[torch.full((1, 2), slope)])
    assert found.item() == pytest.approx(expected)
    if slope == 0:  # the adaptive choice for both, as 1 < 2 and 1 < 3
        assert lower_bounds(trace, bound).item() == pytest.approx(expected)


def test_adaptive_slopes_take_the_smaller_area():
    lower, upper = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([2.0, 1.0, 1.0])
    assert adaptive_slopes(Interval.between(lower, upper)).tolist() == [1.0, 0.0, 0.0]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_lines_stay_below_the_relu_for_any_slopes(seed):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    # Boxes across 0, on either side of it, and ending at it.
    ends = (6 * uniform(2, 4, 5) - 3).round(decimals=0).sort(0).values
    box = Interval.between(ends[0], ends[1])
    bound = LinearBound(6 * uniform(4, 3, 5) - 3, uniform(4, 3))
    relaxed = relax_relu(bound, box, uniform(4, 5))
    for _ in range(10):
        z = box.lower + 2 * box.radius * uniform(4, 5)
        value = inner_products(bound.coefficients, z.relu()) + bound.constant
        assert (inner_products(relaxed.coefficients, z) + relaxed.constant <= value + 1e-9).all()


def test_lines_are_exact_where_the_sign_is_known():
    box = Interval.between(torch.tensor([[1.0, -3.0, 0.0]]), torch.tensor([[2.0, -1.0, 0.0]]))
    bound = LinearBound(torch.tensor([[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]]), torch.ones(1, 2))
    relaxed = relax_relu(bound, box, torch.full((1, 3), 0.5))
    assert relaxed.coefficients[0, :, :2].tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert relaxed.constant.tolist() == [[1.0, 1.0]]


def test_rows_have_the_boxes_of_their_images():
    box = Interval(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    trace = [(nn.ReLU(), box)]
    minus_one = LinearBound(-torch.ones(3, 1, 1), torch.zeros(3, 1))
    assert lower_bounds(trace, minus_one, torch.tensor([1, 0, 1])).tolist() == [[-4], [-1], [-4]]


def test_a_relu_that_computes_something_else_is_refused():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    box = Interval(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(UnsupportedLayer, match="Shifted"):
        lower_bounds([(Shifted(), box)], LinearBound(torch.ones(1, 1, 2), torch.zeros(1, 1)))


def test_rounding_takes_what_the_errors_of_values_may_add_up_to():
    bound = LinearBound(torch.tensor([[[2.0, -3.0], [0.0, 1.0]]]), torch.tensor([[1.0, 0.0]]))
    center, radius, error = torch.tensor([[[5.0, 7.0]], [[2.0, 2.0]], [[0.5, 0.25]]])
    found = before_rounding(bound, Computed(center, radius, error))
    assert found.coefficients is bound.coefficients
    assert found.constant.tolist() == [[1.0 - (2 * 0.5 + 3 * 0.25), -0.25]]
    for box in (Interval(center, radius), Computed(center, radius, None)):
        assert torch.equal(before_rounding(bound, box).constant, bound.constant)
    # h >= z - 0.5 and h <= z + 0.5 for z in [-1, 3]; each comes once.
    box = Computed(torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[0.5]]))
    minus_one = LinearBound(torch.tensor([[[-1.0]]]), torch.zeros(1, 1))
    assert lower_bounds([(nn.Identity(), box)], minus_one).tolist() == [[-3.5]]
