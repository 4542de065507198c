"""The losses of a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from robust_app.crown_margins import crown_ibp_margins
from robust_app.interval import Interval
from robust_app.losses import Objective, certified_loss
from robust_app.margins import layer_inputs, margin_bounds
from robust_app.regularizers import regularization


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def small_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.rand(5, 1, 2, 2), torch.randint(3, (5,))


def test_certified_loss_by_hand():
    """z = (x, -x) on x in [0.4, 0.6]: the worst margin z₀ - z₁ = 2x is 0.8."""
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data[:] = torch.tensor([[1.0], [-1.0]])
    box = Interval.around(torch.tensor([[0.5]]), 0.1)
    loss = certified_loss(layer, box, torch.tensor([0]))
    torch.testing.assert_close(loss, torch.tensor(-0.8).exp().log1p())


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=20)
def test_certified_loss_bounds_the_loss_at_every_point_of_the_ball(seed, share):
    network, (x, labels) = small_network(seed), small_batch(seed)
    bound = certified_loss(network, Interval.around(x, 0.1), labels, crown_share=share)
    for _ in range(50):
        corner = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
        assert F.cross_entropy(network(corner), labels) <= bound + 1e-6


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_certified_loss_of_radius_zero_is_the_natural_loss(share):
    network, (x, labels) = small_network(), small_batch()
    torch.testing.assert_close(
        certified_loss(network, Interval.around(x, 0.0), labels, crown_share=share),
        F.cross_entropy(network(x), labels),
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_crown_share_mixes_the_margins_and_not_the_losses(share):
    network, (x, labels) = small_network(), small_batch()
    box = Interval.around(x, 0.2)
    of_ibp, of_crown = (
        margins(network, box, labels) for margins in (margin_bounds, crown_ibp_margins)
    )
    assert not torch.allclose(of_ibp, of_crown)  # else this test shows nothing
    mixture = (1 - share) * of_ibp + share * of_crown
    torch.testing.assert_close(
        certified_loss(network, box, labels, crown_share=share), F.cross_entropy(-mixture, labels)
    )


def test_box_regularizers_are_added_with_their_weight():
    network, (x, labels) = small_network(), small_batch()
    box = Interval.around(x, 0.2)
    extra = regularization(layer_inputs(network, box))
    assert extra > 0
    torch.testing.assert_close(
        certified_loss(network, box, labels, box_regularizers=0.3),
        certified_loss(network, box, labels) + 0.3 * extra,
    )


def test_objective_computes_any_loss_through_its_forward():
    network, (x, labels) = small_network(), small_batch()
    objective, seen = Objective(network), []
    objective.register_forward_hook(lambda *_: seen.append(1))
    loss = objective(lambda layers: F.cross_entropy(layers(x), labels))
    torch.testing.assert_close(loss, F.cross_entropy(network(x), labels))
    assert seen == [1]
    assert list(objective.parameters()) == list(network.parameters())
