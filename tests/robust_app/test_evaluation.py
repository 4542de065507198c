"""Errors reported, and the check that bounds and attacks do not contradict each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robust_app.evaluation import Contradiction, Errors, evaluate, standard_and_certified


def two_pixel_network() -> nn.Module:
    """Class 0 where the first pixel is the brighter one, by their difference."""
    return nn.Flatten()


IMAGES = torch.tensor([[0.9, 0.1], [0.6, 0.5], [0.5, 0.45], [0.2, 0.8]]).view(4, 1, 1, 2)
LABELS = torch.zeros(4, dtype=torch.int64)
ATTACK = {"pgd_steps": 5, "pgd_restarts": 1, "seed": 0}


def test_errors_by_hand():
    # Radius 0.04 closes gaps below 0.08: the third image falls, the fourth is wrong as it is.
    errors = evaluate(two_pixel_network(), IMAGES, LABELS, 0.04, **ATTACK)

    assert errors == Errors(examples=4, misclassified=1, falsified=2, certified=2)
    assert (errors.standard, errors.attacked, errors.verified) == (25.0, 50.0, 50.0)
    assert errors.undecided == 0


def test_what_is_neither_broken_nor_proved_is_undecided():
    def proves_nothing(network, x, labels, epsilon):
        return torch.zeros(len(x), dtype=torch.bool)

    errors = evaluate(two_pixel_network(), IMAGES, LABELS, 0.04, verifier=proves_nothing, **ATTACK)

    assert (errors.certified, errors.falsified, errors.undecided) == (0, 2, 2)
    assert errors.verified == 100.0
    assert errors.as_dict()["undecided"] == 2


def test_an_unsound_verifier_is_caught():
    def proves_everything(network, x, labels, epsilon):
        return torch.ones(len(x), dtype=torch.bool)

    with pytest.raises(Contradiction, match="2 certified images have counterexamples"):
        evaluate(two_pixel_network(), IMAGES, LABELS, 0.04, verifier=proves_everything, **ATTACK)


def test_bytes_count_as_pixels():
    images = (IMAGES * 255).round().to(torch.uint8)
    errors = evaluate(two_pixel_network(), images, LABELS, 0.04, **ATTACK)
    assert errors == Errors(examples=4, misclassified=1, falsified=2, certified=2)


def test_every_batch_is_counted_and_told():
    images, labels = IMAGES.repeat(600, 1, 1, 1), LABELS.repeat(600)
    told = []

    errors = evaluate(two_pixel_network(), images, labels, 0.04, on_batch=told.append, **ATTACK)

    assert told == [1000, 1000, 400]
    assert errors == Errors(examples=2400, misclassified=600, falsified=1200, certified=1200)
    assert standard_and_certified(two_pixel_network(), images, labels, 0.04).tolist() == [600, 1200]


@given(st.integers(1, 10_000), st.data())
def test_errors_are_ordered_whatever_the_rounding(examples, data):
    falsified = data.draw(st.integers(0, examples))
    misclassified = data.draw(st.integers(0, falsified))
    certified = data.draw(st.integers(0, examples - falsified))
    errors = Errors(examples, misclassified, falsified, certified)
    assert errors.standard <= errors.attacked <= errors.verified
