import math

import pytest
import torch

from robust_app.interval import Computed, Interval, check_images


def test_around_is_the_ball_within_the_image_domain():
    box = Interval.around(torch.tensor([0.0, 0.125, 0.5, 1.0]), 0.25)
    torch.testing.assert_close(box.lower, torch.tensor([0.0, 0.0, 0.25, 0.75]))
    torch.testing.assert_close(box.upper, torch.tensor([0.25, 0.375, 0.75, 1.0]))


def test_around_takes_epsilon_as_a_tensor():
    x = torch.rand(2, 3)
    box = Interval.around(x, torch.tensor(0.25))
    torch.testing.assert_close(box.lower, Interval.around(x, 0.25).lower)
    torch.testing.assert_close(box.upper, Interval.around(x, 0.25).upper)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_around_refuses_an_epsilon_that_is_no_radius(epsilon):
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        Interval.around(torch.zeros(1), epsilon)


def test_between_has_the_bounds_given():
    lower, upper = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 2.0])
    box = Interval.between(lower, upper)
    assert torch.equal(box.lower, lower)
    assert torch.equal(box.upper, upper)
    assert torch.equal(box.center, torch.tensor([1.0, 2.0]))
    assert torch.equal(box.radius, torch.tensor([2.0, 0.0]))


def test_the_magnitude_is_that_of_the_end_farther_from_0():
    box = Interval.between(torch.tensor([-3.0, -1.0, 2.0]), torch.tensor([-1.0, 2.0, 5.0]))
    assert box.magnitude.tolist() == [3.0, 2.0, 5.0]


def test_a_choice_of_boxes_keeps_what_they_are():
    values = torch.arange(6.0).view(3, 2)
    plain, computed = Interval(values, values + 1), Computed(values, values + 1, values + 2)
    for images in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        chosen = plain.select(images)
        assert torch.equal(chosen.center, values[images])
        assert torch.equal(chosen.radius, values[images] + 1)
        again = computed.select(images)
        assert torch.equal(again.radius, values[images] + 1)
        assert torch.equal(again.error, values[images] + 2)
        assert Computed(values, values, None).select(images).error is None


def test_images_of_which_one_pixel_is_outside_of_the_domain_are_refused_with_their_range():
    check_images(torch.tensor([[0.0, 1.0]]))
    check_images(torch.empty(0, 2))
    with pytest.raises(ValueError, match=r"^x: .* \[0, 1\], found values from 0\.5 to 2\.0$"):
        check_images(torch.tensor([[0.5, 2.0]]))
    with pytest.raises(ValueError, match=r"to 1\.0000001"):
        check_images(torch.tensor([1 + 2.0**-23]))
