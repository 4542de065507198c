import pytest
from bias import measure


@pytest.fixture(scope="module")
def measured():
    return measure(seed=0, batches=500)


def test_weights_of_past_moments_leave_the_mean_step_unbiased(measured):
    past, _ = measured
    # Four coordinates: 4 standard errors happen to one unbiased seed in 4000.
    assert past.z < 4
    assert past.size < 3 * past.sampling_error


def test_weights_of_the_batch_itself_bias_the_mean_step(measured):
    _, own = measured
    assert own.z > 5
    assert own.size > 0.1


def test_the_measurement_is_the_same_each_time():
    assert measure(seed=1, batches=20) == measure(seed=1, batches=20)
