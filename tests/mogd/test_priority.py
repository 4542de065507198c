import math

import numpy as np
import pytest
import torch

from mogd import Fixed, Threshold
from mogd.priority import ask

LOSSES = torch.tensor([3.0, 4.0], dtype=torch.float64)
SOUND = torch.ones(len(LOSSES), dtype=torch.bool)


@pytest.mark.parametrize("index", [0, 1, 7, np.int64(1)])
def test_fixed_favours_the_same_loss_whatever_the_losses(index):
    assert Fixed(index)(LOSSES) == Fixed(index)(LOSSES.flip(0)) == index


@pytest.mark.parametrize("index", [-1, True, 1.0, None, "0"])
def test_fixed_refuses_what_is_no_index(index):
    with pytest.raises(ValueError, match=f"index must be an integer .* got {index!r}"):
        Fixed(index)


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (0.4, 0.5, 0),
        (0.5, 0.5, 0),
        (0.6, 0.5, 1),
        (0.0, 0.0, 0),
        (-1.0, 0.0, 0),
        (1.0, math.inf, 0),
    ],
)
def test_threshold_favours_the_first_up_to_and_at_the_limit(value, limit, expected):
    answer = Threshold(lambda losses: losses.new_tensor(value), limit)(LOSSES)
    assert answer.shape == ()
    assert not answer.is_floating_point()
    assert answer == expected


def test_threshold_measures_the_losses_of_the_step():
    oracle = Threshold(lambda losses: losses[1] - losses[0], 0.5)
    assert oracle(LOSSES) == 1
    assert oracle(LOSSES.flip(0)) == 0


def test_the_limit_may_be_moved():
    oracle = Threshold(lambda losses: losses[0], 5.0)
    assert oracle(LOSSES) == 0
    oracle.limit = 2.0
    assert oracle(LOSSES) == 1


@pytest.mark.parametrize(
    "answer",
    [
        1,
        np.int64(1),  # of numpy's argmax
        *(torch.tensor(1, dtype=getattr(torch, f"int{bits}")) for bits in (8, 16, 32, 64)),
    ],
)
def test_an_answer_may_be_an_int_or_any_0_dim_integer_tensor(answer):
    asked = ask(lambda _: answer, LOSSES, SOUND)
    assert asked.shape == ()
    assert asked.dtype == torch.int64
    assert asked == 1


def test_the_priority_is_asked_about_the_losses():
    assert ask(lambda losses: losses.argmax(), LOSSES, SOUND) == 1
    assert ask(lambda losses: losses.argmax(), LOSSES.flip(0), SOUND) == 0


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (True, "True"),
        (1.0, r"1\.0"),
        (None, "None"),
        ("1", "'1'"),
        (torch.tensor(1.0), r"torch\.float32 of shape \(\)"),
        (torch.tensor(True), r"torch\.bool of shape \(\)"),
        (torch.tensor(1 + 0j), r"torch\.complex64 of shape \(\)"),
        (torch.tensor([1]), r"torch\.int64 of shape \(1,\)"),
        (torch.tensor([0, 1]), r"torch\.int64 of shape \(2,\)"),
    ],
)
def test_an_answer_of_another_kind_is_refused(answer, found):
    with pytest.raises(TypeError, match=f"priority must return an int.* got {found}"):
        ask(lambda _: answer, LOSSES, SOUND)


@pytest.mark.parametrize("index", [-1, 2, 100])
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_an_answer_out_of_range_is_refused(index, kind):
    with pytest.raises(ValueError, match=f"an index of 2 losses, got {index}"):
        ask(lambda _: kind(index), LOSSES, SOUND)


@pytest.mark.parametrize("measure", [None, 0.1, LOSSES])
def test_threshold_refuses_a_measure_that_cannot_be_called(measure):
    with pytest.raises(TypeError, match="measure must be callable, got"):
        Threshold(measure, limit=0.1)


def test_what_a_priority_does_in_place_is_not_seen():
    losses = LOSSES.clone()
    assert ask(lambda values: values.neg_().argmax(), losses, SOUND) == 0
    assert torch.equal(losses, LOSSES)


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        *((limit, TypeError, "a number or a 0-dim tensor") for limit in ("a", None, [0.1], True)),
        (torch.ones(2), TypeError, "a number or a 0-dim tensor"),
        (math.nan, ValueError, "a number to compare with"),
        (np.float32("nan"), ValueError, "a number to compare with"),
    ],
)
def test_threshold_refuses_a_limit_that_is_no_number_whenever_it_is_set(limit, error, message):
    with pytest.raises(error, match=f"limit must be {message}, got"):
        Threshold(torch.mean, limit=limit)
    set_later = Threshold(torch.mean, limit=0.1)
    set_later.limit = limit
    with pytest.raises(error, match=f"limit must be {message}, got"):
        set_later(LOSSES)


def test_threshold_refuses_a_measure_that_returns_no_tensor():
    with pytest.raises(TypeError, match="measure must return a 0-dim tensor, got None"):
        Threshold(lambda losses: None, limit=0.1)(LOSSES)
    with pytest.raises(TypeError, match=r"measure must return a 0-dim tensor, got tensor\(\[3"):
        Threshold(lambda losses: losses, limit=0.1)(LOSSES)


@pytest.mark.parametrize(
    ("value", "limit"), [(math.nan, 0.5), (9.0, torch.tensor(math.nan)), (math.nan, math.inf)]
)
def test_what_cannot_be_compared_is_not_at_most_the_limit(value, limit):
    assert Threshold(lambda _: torch.tensor(value), limit)(torch.ones(2)) == 1
