import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from vectors import doubles, gramian, norms, weigh

from mogd import (
    BisectorProjection,
    Constant,
    Fixed,
    GramianRule,
    Rule,
    UnbiasedMultiGradient,
    Weighting,
)
from mogd.rules import against, conflicting


@pytest.mark.parametrize(
    ("m", "expected"),
    [
        (doubles([1, 0], [1, 1]), False),
        (doubles([1, 0], [-1, 1]), True),
        (doubles([1, 0], [0, 1]), True),
        (doubles([1, 0], [0, 0]), False),
        (doubles([0, 0], [0, 0]), False),
        (doubles([1, 0], [1, 1], [1, 2]), False),
        (doubles([1, 0], [1, 1], [-1, 3]), True),
        (doubles([1, 0], [0, 0], [1, 1]), False),
        (doubles([1, 0, 0], [1, 1, 0], [0, 0, 1]), False),
        (doubles([1, 0]), False),
    ],
)
def test_moments_conflict_unless_their_inner_product_is_positive(m, expected):
    conflict = conflicting(gramian(m), m.norm(dim=1), torch.tensor(0))
    assert conflict.shape == ()
    assert bool(conflict) is expected


def test_no_loss_is_against_itself():
    assert against(torch.zeros(2, 2), torch.tensor(0)).tolist() == [False, True]
    assert not conflicting(torch.zeros(1, 1), torch.ones(1), torch.tensor(0))


def test_of_several_losses_the_conflicts_of_the_favoured_one_count():
    m = doubles([1, 1, 3], [1, -1, 0.5], [-1, 1, 0.5])
    found = [bool(conflicting(gramian(m), norms(m), torch.tensor(k))) for k in range(3)]
    assert found == [False, True, True]
    assert against(gramian(m), torch.tensor(1)).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "weights", [(1.0,), (2, -3), [0.25, 0.5, 0.25], (1e39, 0.1), [Fraction(1, 2), 10**20]]
)
def test_constant_weighs_the_same_whatever_the_moments(weights):
    rule = Constant(weights)
    for m in (torch.zeros(len(weights), 2), torch.randn(len(weights), 2)):
        weighting = weigh(m.double(), 0, rule=rule)
        assert weighting.weights.tolist() == list(weights)
        assert weighting.regularization.tolist() == [0] * len(weights)
        assert weighting.weights.dtype == torch.float64


@pytest.mark.parametrize(
    "weights",
    [
        (),
        [math.nan],
        (1.0, math.inf),
        0.5,
        0.0,
        [[1.0, 2.0]],
        (1, "a"),
        None,
        "a",
        [1j, 1.0],
        (10**400, 1),
        np.array([1j, 1.0]),
        torch.ones(2) * 1j,
    ],
)
def test_constant_refuses_what_is_no_list_of_finite_numbers(weights):
    with pytest.raises(ValueError, match="weights must be one finite number for each loss"):
        Constant(weights)


def test_constant_takes_a_tensor_and_keeps_its_numbers():
    given = torch.nn.Parameter(torch.tensor([0.25, 3.0]))
    rule = Constant(given)
    with torch.no_grad():
        given.zero_()
    weights = weigh(torch.eye(2, dtype=torch.float64), 0, rule=rule).weights
    assert weights.tolist() == [0.25, 3.0]
    assert not weights.requires_grad


def test_constant_refuses_another_number_of_losses():
    with pytest.raises(ValueError, match="weights for 2 losses, got 3 losses"):
        weigh(torch.eye(3, dtype=torch.float64), 0, rule=Constant((1, 1)))


def inverse_diagonal(gramian):
    return torch.linalg.inv(gramian).diagonal()


def test_any_function_of_the_gramian_is_a_rule():
    m = doubles([2, 0, 0], [0, 1, 0], [0, 0, 0.5])
    weighting = weigh(m, 0, rule=GramianRule(inverse_diagonal))
    assert_close(weighting.weights, doubles(0.25, 1, 4))
    assert weighting.regularization.tolist() == [0, 0, 0]


def test_a_function_of_the_gramian_may_answer_in_another_precision():
    rule = GramianRule(lambda gramian: gramian.float().diagonal())
    assert weigh(doubles([2, 0], [0, 1]), 0, rule=rule).weights.dtype == torch.float64


def test_a_function_that_inverts_the_gramian_is_not_asked_about_a_singular_one_at_first():
    unseen = torch.zeros(3, 4, dtype=torch.float64)
    weights = weigh(unseen, 0, rule=GramianRule(inverse_diagonal)).weights
    assert_close(weights, doubles(1, 1, 1))


class InverseNorms(Rule):
    """Divides by 0 where there has been no gradient, and regularises there too."""

    def __call__(self, gramian, norms, prioritized):
        return Weighting(1 / norms, torch.ones_like(norms))


@pytest.mark.parametrize(
    "rule", [BisectorProjection(0.7), inverse_diagonal, InverseNorms(), lambda g: g[0] * torch.nan]
)
@pytest.mark.parametrize("losses", [2, 3])
def test_before_any_gradient_no_rule_is_believed_that_needs_the_past(rule, losses):
    point = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = UnbiasedMultiGradient([point], lr=0.1, rule=rule, priority=Fixed(1))
    record = optimizer.backward([(point - k).square().sum() for k in range(losses)])
    assert record.weights.tolist() == [1 / losses] * losses
    assert record.factors.tolist() == [1 / losses] * losses  # no regularisation
    assert not record.conflict


def test_a_rule_is_believed_from_the_second_step_on():
    point = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = UnbiasedMultiGradient([point], lr=0.0, rule=InverseNorms())
    for _ in range(2):
        record = optimizer.step(lambda: (2 * point[0], 4 * point[1]))
    assert record.weights.tolist() == [0.5, 0.25]
    assert record.regularization.tolist() == [1, 1]


def test_constant_weights_need_no_past():
    point = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = UnbiasedMultiGradient([point], lr=0.1, rule=Constant((3.0, 4.0)))
    assert optimizer.step(lambda: (point.sum(), point.prod())).weights.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(2, 1), r"\(2, 1\)"),
        (torch.ones(()), r"\(\)"),
        ([0.5, 0.5], "list"),
        (torch.ones(2) * 1j, r"torch\.complex64"),
        (None, "NoneType"),
    ],
)
def test_a_function_that_returns_anything_but_one_weight_a_loss_is_refused(answer, found):
    def crooked(_):
        return answer

    with pytest.raises(ValueError, match=f"tensor of 2 weights, got {found} from .*crooked"):
        weigh(doubles([3, 0], [4, 3]), 0, rule=GramianRule(crooked))
