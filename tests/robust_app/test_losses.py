"""The losses of a batch and how a method yields them."""

import torch
from torch import nn
from torch.nn import functional as F

from mogd import Threshold, UnbiasedMultiGradient
from robust_app.fosc import Stationarity
from robust_app.losses import Objective, certified_loss
from robust_app.methods import LOSSES, Batch, joint_losses


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def small_batch(epsilon: float = 0.1) -> Batch:
    torch.manual_seed(1)
    x = torch.rand(5, 1, 2, 2)
    return Batch(x, torch.randint(3, (5,)), 2 * torch.rand_like(x) - 1, torch.tensor(epsilon))


def test_certified_loss_bounds_the_loss_at_every_point_of_the_ball():
    network, batch = small_network(), small_batch()
    bound = certified_loss(network, batch.x, batch.labels, 0.1)
    for _ in range(100):
        corner = (batch.x + 0.1 * torch.randn_like(batch.x).sign()).clamp(0, 1)
        assert F.cross_entropy(network(corner), batch.labels) <= bound


def test_certified_loss_of_radius_zero_is_the_natural_loss():
    network, batch = small_network(), small_batch()
    torch.testing.assert_close(
        certified_loss(network, batch.x, batch.labels, 0.0),
        F.cross_entropy(network(batch.x), batch.labels),
    )


def test_objective_computes_both_losses_through_its_forward():
    network, batch = small_network(), small_batch()
    objective = Objective(network)
    torch.testing.assert_close(
        objective(batch.x, batch.labels), F.cross_entropy(network(batch.x), batch.labels)
    )
    torch.testing.assert_close(
        objective(batch.x, batch.labels, batch.epsilon),
        certified_loss(network, batch.x, batch.labels, 0.1),
    )


def test_joint_losses_come_in_their_order_and_feed_the_oracle():
    network, batch, stationarity = small_network(), small_batch(), Stationarity()
    optimizer = UnbiasedMultiGradient(
        network.parameters(), lr=0.1, priority=Threshold(stationarity, 0.0)
    )

    record = optimizer.backward(
        joint_losses(Objective(network), network, batch, 1.25, stationarity)
    )

    adversarial, certified = record.losses
    assert LOSSES == ("adversarial", "certified")
    assert F.cross_entropy(network(batch.x), batch.labels) < adversarial < certified
    assert stationarity.x_adv.grad is not None  # read by the oracle at no further pass
    distance = (stationarity.x_adv - batch.x).abs().max()
    assert 0 < distance <= 0.1 + 1e-6


def test_each_loss_is_made_only_when_asked_for():
    network, batch, stationarity = small_network(), small_batch(), Stationarity()
    calls = []

    def objective(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(len(arguments))
        return Objective(network)(*arguments)

    losses = joint_losses(objective, network, batch, 1.25, stationarity)
    assert calls == []
    next(losses)
    assert calls == [2]
    next(losses)
    assert calls == [2, 3]
