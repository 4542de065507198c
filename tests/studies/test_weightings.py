import pytest
import torch

from mogd import UnbiasedMultiGradient
from tests.studies.variations import OwnBatch
from tests.studies.weightings import CURVATURES, MINIMA, bias, losses, weightings

NAMES = ("UPGrad", "MGDA", "PCGrad")


@pytest.fixture(scope="module")
def torchjd():
    pytest.importorskip("torchjd")
    return weightings()


@pytest.mark.parametrize("name", NAMES)
def test_through_moments_the_mean_step_is_unbiased(torchjd, name):
    found = bias(torchjd[name], UnbiasedMultiGradient, batches=300)
    # Four coordinates: 4 standard errors happen to one unbiased seed in 4000.
    assert found.z < 4
    assert found.size < 3 * found.sampling_error


@pytest.mark.parametrize("name", NAMES)
def test_of_the_batch_itself_it_is_biased(torchjd, name):
    found = bias(torchjd[name], OwnBatch, batches=1000)
    assert found.z > 5
    assert found.size > 3 * found.sampling_error


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_the_gramian_of_the_moments(torchjd, name):
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = UnbiasedMultiGradient([theta], lr=0.01, rule=torchjd[name])
    for _ in range(5):
        torch.manual_seed(0)
        record = optimizer.backward(losses(theta, torch.randn_like(MINIMA)))
        optimizer.step()
    torch.manual_seed(0)
    torch.randn_like(MINIMA)  # what the last batch drew before its weights were taken
    assert torch.equal(record.weights, torchjd[name](record.gramian))


def test_the_noise_is_that_of_the_gradient():
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn_like(MINIMA)
    found = torch.stack([torch.autograd.grad(loss, theta)[0] for loss in losses(theta, noise)])
    torch.testing.assert_close(found, -CURVATURES * MINIMA + noise)
