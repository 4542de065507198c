import re

import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_app.exchange.vnnlib import robustness


def test_a_property_by_hand():
    image = torch.tensor([[[0.0, 0.5], [0.875, 1.0]]])
    assert robustness(image, 1, 0.25, classes=3).splitlines() == [
        "; class 1, l_inf radius 0.25 in pixels of [0, 1]",
        "(declare-const X_0 Real)",
        "(declare-const X_1 Real)",
        "(declare-const X_2 Real)",
        "(declare-const X_3 Real)",
        "(declare-const Y_0 Real)",
        "(declare-const Y_1 Real)",
        "(declare-const Y_2 Real)",
        "(assert (>= X_0 0.0))",
        "(assert (<= X_0 0.25))",
        "(assert (>= X_1 0.25))",
        "(assert (<= X_1 0.75))",
        "(assert (>= X_2 0.625))",
        "(assert (<= X_2 1.0))",
        "(assert (>= X_3 0.75))",
        "(assert (<= X_3 1.0))",
        "(assert (or",
        "  (and (>= Y_0 Y_1))",
        "  (and (>= Y_2 Y_1))",
        "))",
    ]


@given(
    pixels=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6),
    epsilon=st.one_of(st.floats(0, 1), st.floats(0, 1e-6)),
)
def test_numbers_are_those_of_the_box_and_have_no_exponent(pixels, epsilon):
    text = robustness(torch.tensor([[pixels]]), 0, epsilon, classes=2)
    found = re.findall(r"\((>=|<=) X_(\d+) (\S+?)\)", text)
    assert len(found) == 2 * len(pixels)
    for side, index, number in found:
        assert re.fullmatch(r"\d+\.\d+", number)
        moved = pixels[int(index)] + (epsilon if side == "<=" else -epsilon)
        assert float(number) == min(max(moved, 0.0), 1.0)
