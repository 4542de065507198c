import math

import pytest
import torch
from torch import nn

from robust_app.layers import ElementwiseAffine, Normalize, Residual


def test_normalize_uses_the_mean_and_std_of_each_channel():
    layer = Normalize(mean=[0.5, 0.25], std=[0.5, 0.125])
    x = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.25]]]])  # (1, 2, 1, 2)
    expected = torch.tensor([[[[1.0, -1.0]], [[2.0, 0.0]]]])
    torch.testing.assert_close(layer(x), expected)


def test_normalize_has_no_parameters_and_travels_with_the_state_dict():
    layer = Normalize([0.1], [0.2])
    other = Normalize([0.0], [1.0])
    other.load_state_dict(layer.state_dict())
    assert list(layer.parameters()) == []
    torch.testing.assert_close(other(torch.ones(1, 1, 1)), torch.tensor([[[4.5]]]))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([], [], "0 and 0 entries"),
        ([0.5], [0.5, 0.5], "1 and 2 entries"),
        ([math.nan], [0.5], "mean must be finite"),
        ([0.5], [0.0], "std must be finite and above 0"),
        ([0.5], [-1.0], "std must be finite and above 0"),
        ([0.5], [math.inf], "std must be finite and above 0"),
    ],
)
def test_normalize_refuses_wrong_statistics(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)


def test_residual_adds_the_identity_by_default():
    body = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        body.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    output = Residual(body)(torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(output, torch.tensor([[4.0, 8.0]]))


def test_residual_adds_the_shortcut_given():
    output = Residual(nn.ReLU(), shortcut=nn.Tanh())(torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(output, torch.tensor([2 + math.tanh(2), math.tanh(-1)]))


def test_elementwise_affine_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        ElementwiseAffine(torch.ones(2), torch.ones(1))
