import pytest
import torch
from torch import nn

from robust_app import models
from robust_app.errors import UserError
from robust_app.exchange.parity import check_parity, parity
from robust_app.exchange.writing import to_onnx
from tests.robust_app.exchange.models import model, node


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.build("dm-small", (1, 9, 9), classes=10, mean=[0.4], std=[0.3]).eval()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_same_network_is_within_rounding_at_every_scale(network, scale):
    network[-1].weight.data *= scale
    network[-1].bias.data *= scale
    x = torch.rand(50, 1, 9, 9)
    found = check_parity(to_onnx(network, (1, 9, 9)), network, x)
    assert 0 < found.difference <= found.tolerance
    assert found.tolerance <= 1e-4 * network(x).abs().max()


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_a_small_error_in_a_weight_is_seen(network, value):
    made, x = to_onnx(network, (1, 9, 9)), torch.rand(50, 1, 9, 9)
    network[-1].bias.data[3] += value
    with pytest.raises(UserError, match=r"differ by up to .*; rounding explains"):
        check_parity(made, network, x)


@pytest.mark.parametrize("batch", [1, 4, "batch"])
def test_a_model_with_a_batch_of_its_own_and_flat_images(batch):
    weight = torch.randn(6, 3)
    made = model([node("MatMul", "X", "w")], (6,), {"w": weight}, batch=batch)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(6, 3, bias=False)), torch.rand(10, 1, 2, 3)
    network[1].weight.data = weight.T.contiguous()
    found = parity(made, network, x)
    assert found.difference <= found.tolerance
    network[1].weight.data[0, 0] += 1
    assert parity(made, network, x).difference == pytest.approx(
        x[:, 0, 0, 0].max().item(), rel=1e-4
    )


def test_a_model_with_another_number_of_logits_is_refused():
    with pytest.raises(UserError, match=r"of shape \(2, 6\) for 2 images, .* shape \(2, 3\)"):
        parity(model([node("Relu", "X")], (6,)), nn.Linear(6, 3), torch.rand(2, 6))


def test_a_model_that_does_not_run_is_refused(network):
    made = model([node("MatMul", "X", "w")], (7,), {"w": torch.ones(6, 3)})
    with pytest.raises(UserError, match="ONNX Runtime does not run the model"):
        parity(made, nn.Flatten(), torch.rand(2, 7))
