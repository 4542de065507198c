"""Boxes bounded anew, by hand; what ascents find is tested with the verifiers, in test_crown."""

import torch
from torch import nn

from robust_app.interval import Computed, Interval
from robust_app.slopes import tightened
from tests.robust_app.networks import linear


def test_boxes_end_where_a_pass_back_ends_or_the_box_did():
    layer = linear([[1.0, -1.0], [2.0, 1.0], [1.0, 0.0]], [0.0, -3.0, 5.0])
    trace = [(layer, Interval.between(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]])))]
    # z1 in [-2, 1] and z2 in [-3, 1], each widened by its error; z3 has no 0 inside and stays.
    error = torch.tensor([[0.25, 0.5, 0.5]])
    loose = Interval.between(torch.tensor([[-9.0, -1.0, 1.0]]), torch.tensor([[7.0, 8.0, 99.0]]))
    for rows_at_once in (1, 2, 99):
        box = tightened(trace, Computed(loose.center, loose.radius, error), rows_at_once)
        assert box.lower.tolist() == [[-2.25, -1.0, 1.0]]
        assert box.upper.tolist() == [[1.25, 1.5, 99.0]]
        assert box.error is error


def test_ends_that_pass_each_other_meet():
    """As rounding may have it: then the radius is 0, and not below."""
    trace = [(nn.Identity(), Interval.between(torch.tensor([[0.625]]), torch.tensor([[2.0]])))]
    box = Interval.between(torch.tensor([[-1.0]]), torch.tensor([[0.5]]))
    tighter = tightened(trace, Computed(box.center, box.radius, None), 1)
    assert (tighter.center.item(), tighter.radius.item()) == (0.625, 0.0)
