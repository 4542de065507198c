"""What a step differentiates: each loss against its definition, computed by hand."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mogd import Threshold, UnbiasedMultiGradient
from robust_app import attacks, methods
from robust_app.batch_norm import BatchNorm, clean_statistics
from robust_app.bounds import propagate
from robust_app.fosc import Stationarity
from robust_app.interval import Interval
from robust_app.losses import Objective, certified_loss
from robust_app.margins import layer_inputs
from robust_app.methods import METHODS, Attack
from robust_app.regularizers import regularization
from robust_app.schedules import Phase, Setting
from robust_app.steps import Batch, Losses

EPSILON = 0.1
RANDOM_START = Attack(steps=1, step=1.25)


def small_network(*, batch_norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = [BatchNorm(8)] if batch_norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), *norm, nn.ReLU(), nn.Linear(8, 3))


def small_batch(epsilon: float = EPSILON, seed: int = 1) -> Batch:
    torch.manual_seed(seed)
    x = torch.rand(5, 1, 2, 2)
    start = 2 * torch.rand_like(x) - 1
    return Batch.of_images(x, torch.randint(3, (5,)), start, torch.tensor(epsilon))


def now(**changes: float) -> Setting:
    values = {"epsilon": EPSILON, "fosc_threshold": 0.0, "learning_rate": 0.1}
    shares = {"natural_weight": 0.5, "crown_share": 0.25, "box_regularizers": 0.0}
    return Setting(phase=Phase.MAIN, **(values | shares | changes))


def losses_of(network: nn.Module, method: str = "advibp", attack: Attack = RANDOM_START) -> Losses:
    return Losses(Objective(network), network, METHODS[method], attack, Stationarity())


def only(losses: Losses, name: str, batch: Batch, setting: Setting | None = None) -> Tensor:
    [loss] = losses.of([name], batch, setting or now())
    return loss


# --- Batches


def test_a_batch_of_images_is_surrounded_by_its_balls():
    batch = small_batch(0.3)
    assert torch.equal(batch.center, batch.x)
    torch.testing.assert_close(batch.box.lower, (batch.x - 0.3).clamp(0, 1))
    torch.testing.assert_close(batch.box.upper, (batch.x + 0.3).clamp(0, 1))
    assert (batch.radius.item(), batch.domain) == (pytest.approx(0.3), (0.0, 1.0))


def test_a_hidden_batch_is_what_layers_make_of_images_and_balls():
    network = small_network()
    before, images = network[:3], small_batch()
    start = torch.zeros(5, 8)
    batch = Batch.of_hidden(before, images.x, images.labels, start, images.radius)
    box = propagate(before, Interval.around(images.x, EPSILON))
    torch.testing.assert_close(batch.x, before(images.x))
    torch.testing.assert_close(batch.box.center, box.center)
    torch.testing.assert_close(batch.radius, box.radius)
    assert torch.equal(batch.center, batch.box.center)
    assert batch.radius.shape == (5, 8)  # each neuron of each example has its own
    assert len(batch.radius.unique()) > 8
    assert not batch.x.requires_grad
    assert not batch.box.radius.requires_grad
    # ReLU boxes are not centred at what the clean image gives.
    assert not torch.allclose(batch.x, batch.center)


# --- Each loss by name


def test_the_natural_loss_is_the_cross_entropy_of_the_images():
    network, batch = small_network(), small_batch()
    expected = F.cross_entropy(network(batch.x), batch.labels)
    torch.testing.assert_close(only(losses_of(network), "natural", batch), expected)


def test_the_adversarial_loss_is_the_cross_entropy_of_the_examples_found():
    network, batch = small_network(), small_batch()
    losses = losses_of(network)
    x_adv = attacks.fgsm(
        network, batch.x, batch.labels, EPSILON, start=batch.start, step_size=1.25 * EPSILON
    )
    found = only(losses, "adversarial", batch)
    torch.testing.assert_close(found, F.cross_entropy(network(x_adv), batch.labels))
    assert found > F.cross_entropy(network(batch.x), batch.labels)
    torch.testing.assert_close(losses.stationarity.x_adv.detach(), x_adv)


@pytest.mark.parametrize(("method", "share"), [("advibp", 0.0), ("advcrown-ibp", 0.25)])
def test_the_certified_loss_mixes_crown_bounds_in_where_the_method_says_so(method, share):
    network, batch = small_network(), small_batch()
    expected = certified_loss(
        network,
        Interval.around(batch.x, EPSILON),
        batch.labels,
        crown_share=share,
        box_regularizers=0.5,
    )
    found = only(losses_of(network, method), "certified", batch, now(box_regularizers=0.5))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("method", "crown"), [("ibp", 0.0), ("crown-ibp", 0.25)])
def test_the_mixed_loss_is_natural_and_certified_in_their_shares(share, method, crown):
    network, batch = small_network(), small_batch()
    natural = F.cross_entropy(network(batch.x), batch.labels)
    certified = certified_loss(network, batch.box, batch.labels, crown_share=crown)
    assert natural < certified
    found = only(losses_of(network, method), "mixed", batch, now(natural_weight=share))
    torch.testing.assert_close(found, share * natural + (1 - share) * certified)


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_the_regularisers_keep_their_weight_whatever_the_shares(share):
    network, batch = small_network(), small_batch()
    without = only(losses_of(network, "ibp"), "mixed", batch, now(natural_weight=share))
    regularised = now(natural_weight=share, box_regularizers=0.5)
    found = only(losses_of(network, "ibp"), "mixed", batch, regularised)
    regularizer = regularization(list(layer_inputs(network, batch.box)))
    assert regularizer > 0.01
    torch.testing.assert_close(found, without + 0.5 * regularizer)


def test_a_share_of_nothing_is_not_computed():
    network, batch = small_network(), small_batch()
    passes = []
    network[3].register_forward_hook(lambda *_: passes.append(1))
    only(losses_of(network, "ibp"), "mixed", batch, now(natural_weight=1.0))
    assert passes == [1]  # no bounds
    only(losses_of(network, "ibp"), "mixed", batch, now(natural_weight=0.0))
    assert passes == [1, 1]  # the logits at the box's centre and no more


def test_every_loss_of_every_method_reaches_every_parameter():
    for name, method in METHODS.items():
        network, batch = small_network(batch_norm=True), small_batch()
        for loss_name in ("natural", "adversarial", "certified", *method.losses):
            network.zero_grad()
            only(losses_of(network, name), loss_name, batch).backward()
            for parameter in network.parameters():
                assert parameter.grad is not None, (name, loss_name)


@pytest.mark.parametrize("name", ["natural", "adversarial", "certified", "mixed"])
def test_no_loss_looks_at_a_value(name):
    """On a GPU looking would wait for the device; tensors without values refuse it."""
    network = small_network(batch_norm=True).to("meta")
    x, start = torch.rand(2, 5, 1, 2, 2, device="meta")
    labels = torch.zeros(5, dtype=torch.int64, device="meta")
    batch = Batch.of_images(x, labels, start, torch.full((), EPSILON, device="meta"))
    losses = losses_of(network, "advcrown-ibp")
    shares = {"natural_weight": 0.5, "crown_share": 0.25, "box_regularizers": 0.5}
    on_device = {key: torch.full((), share, device="meta") for key, share in shares.items()}
    loss = only(losses, name, batch, now(**on_device))
    loss.backward()
    assert loss.shape == ()
    if name == "adversarial":
        assert losses.stationarity(torch.zeros(2, device="meta")).shape == ()
    with pytest.raises(RuntimeError, match="meta"):
        bool(loss)  # as a look would


# --- Order and laziness


def test_joint_losses_come_in_their_order_and_feed_the_oracle():
    network, batch = small_network(), small_batch()
    losses = losses_of(network)
    optimizer = UnbiasedMultiGradient(
        network.parameters(), lr=0.1, priority=Threshold(losses.stationarity, 0.0)
    )

    record = optimizer.backward(losses.of(methods.JOINT, batch, now()))

    adversarial, certified = record.losses
    assert methods.JOINT == ("adversarial", "certified")
    assert F.cross_entropy(network(batch.x), batch.labels) < adversarial < certified
    x_adv = losses.stationarity.x_adv
    assert x_adv.grad is not None  # read by the oracle at no further pass
    assert 0 < (x_adv - batch.x).abs().max() <= EPSILON + 1e-6


def test_each_loss_is_made_only_when_asked_for():
    network, batch = small_network(), small_batch()
    objective, calls = Objective(network), []

    def counted(loss: Callable[[nn.Module], Tensor]) -> Tensor:
        calls.append(1)
        return objective(loss)

    losses = Losses(counted, network, METHODS["advibp"], RANDOM_START, Stationarity())
    made = losses.of(("adversarial", "certified"), batch, now())
    assert calls == []
    assert losses.stationarity.x_adv is None  # nor is an attack made
    next(made)
    assert len(calls) == 1
    next(made)
    assert len(calls) == 2


# --- Attacks


class Recorder(nn.Module):
    """Keeps what a network is asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.asked = network, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.network(x)


@pytest.mark.parametrize(
    ("attack", "asked", "random"),
    [
        (Attack(steps=1, step=1.0, random_start=False), 1, False),
        (Attack(steps=1, step=1.25), 1, True),
        (Attack(steps=10, step=0.25), 10, True),
    ],
    ids=["fgsm", "fgsm-random", "pgd"],
)
@given(seed=st.integers(0, 1000), epsilon=st.floats(0.01, 0.6))
@settings(max_examples=15)
def test_attacks_start_step_and_stay_as_they_say(attack, asked, random, seed, epsilon):
    network, batch = Recorder(small_network(seed=seed)), small_batch(epsilon, seed)
    x_adv = losses_of(network, attack=attack).adversarial_examples(network, batch)

    assert len(network.asked) == asked
    start = (batch.x + epsilon * batch.start).clamp(0, 1) if random else batch.x
    torch.testing.assert_close(network.asked[0], start)
    iterates = [*network.asked, x_adv]
    for iterate in iterates:
        assert ((iterate - batch.x).abs() <= epsilon + 1e-6).all()
        assert ((iterate >= 0) & (iterate <= 1)).all()
    for before, after in itertools.pairwise(iterates):
        assert ((after - before).abs() <= attack.step * epsilon + 1e-6).all()
    inside = (x_adv - batch.x).abs() < epsilon - 1e-6
    if not random:  # a whole ε in the direction of the gradient, or to the domain's end
        at_the_end = (x_adv == 0) | (x_adv == 1) | (x_adv == batch.x)
        assert (~inside | at_the_end).all()


def test_an_attack_leaves_no_gradient_behind():
    network, batch = small_network(), small_batch()
    x_adv = losses_of(network).adversarial_examples(network, batch)
    assert not x_adv.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


# --- Hidden batches (A.6)


def hidden(seed: int) -> tuple[nn.Sequential, Batch]:
    network, images = small_network(seed=seed), small_batch(seed=seed)
    start = 2 * torch.rand(5, 8) - 1
    batch = Batch.of_hidden(network[:2], images.x, images.labels, start, images.radius)
    return network[2:], batch


@given(seed=st.integers(0, 1000), steps=st.integers(1, 4))
@settings(max_examples=15)
def test_hidden_adversarial_examples_stay_in_the_box_and_leave_the_domain_of_images(seed, steps):
    after, batch = hidden(seed)
    network = Recorder(after)
    losses = losses_of(network, attack=Attack(steps=steps, step=1.25))
    x_adv = losses.adversarial_examples(network, batch)
    torch.testing.assert_close(network.asked[0], batch.center + batch.radius * batch.start)
    for iterate in (*network.asked, x_adv):
        assert (iterate >= batch.box.lower - 1e-6).all()
        assert (iterate <= batch.box.upper + 1e-6).all()
    assert (x_adv < 0).any()  # nothing is cut at 0
    # A step is of 1.25 radii: neurons with a gradient end at most 0.25 from the box's side.
    moved = x_adv != network.asked[0]
    share = ((x_adv - batch.center) / batch.radius).abs()
    assert (share[moved] >= 0.25 - 1e-5).all()


@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_hidden_fosc_is_the_largest_first_order_gain_in_the_box(seed):
    after, batch = hidden(seed)
    losses = losses_of(after)
    loss = only(losses, "adversarial", batch)
    loss.backward()
    x_adv = losses.stationarity.x_adv
    gradients = x_adv.grad * len(x_adv)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    best = []
    for index, gradient in enumerate(gradients):
        points = batch.center[index] + corners * batch.radius[index]
        best.append(((points - x_adv[index].detach()) @ gradient).max())
    found = losses.stationarity(torch.stack([loss.detach()] * 2))
    torch.testing.assert_close(found, torch.stack(best).mean(), rtol=1e-4, atol=1e-6)


def test_hidden_losses_are_of_the_clean_point_the_example_and_the_box():
    after, batch = hidden(0)
    losses = losses_of(after)
    natural = F.cross_entropy(after(batch.x), batch.labels)
    torch.testing.assert_close(only(losses, "natural", batch), natural)
    certified = certified_loss(after, batch.box, batch.labels)
    torch.testing.assert_close(only(losses, "certified", batch), certified)


# --- BatchNorm


@pytest.mark.parametrize("name", ["natural", "adversarial", "certified", "mixed"])
def test_every_loss_normalises_by_the_clean_images(name):
    network, batch = small_network(batch_norm=True), small_batch()
    losses = losses_of(network, "ibp")
    found = only(losses, name, batch)
    with clean_statistics(network, batch.x) as logits:
        natural = F.cross_entropy(logits(), batch.labels)
        x_adv = attacks.fgsm(
            network, batch.x, batch.labels, EPSILON, start=batch.start, step_size=1.25 * EPSILON
        )
        adversarial = F.cross_entropy(network(x_adv), batch.labels)
        certified = certified_loss(network, batch.box, batch.labels)
    expected = {"natural": natural, "adversarial": adversarial, "certified": certified}
    expected["mixed"] = (natural + certified) / 2
    torch.testing.assert_close(found, expected[name])
    assert not network[2].has_statistics  # forgotten after the step
    assert torch.equal(network[2].running_mean, torch.zeros(8))  # which only estimate sets


def test_gradients_flow_through_the_clean_statistics():
    """A bias before BatchNorm shifts its mean alike: no loss depends on it."""
    network, batch = small_network(batch_norm=True), small_batch()
    for name in ("adversarial", "certified"):
        network.zero_grad()
        only(losses_of(network), name, batch).backward()
        assert network[1].bias.grad.abs().max() < 1e-5  # rounding
        assert network[1].weight.grad.abs().max() > 1e-2


def test_an_attack_needs_no_clean_pass_of_its_own():
    """With BatchNorm three passes: the clean images, the attack, what it found."""
    network, batch = small_network(batch_norm=True), small_batch()
    with torch.no_grad(), clean_statistics(network, batch.x):
        expected = losses_of(network).adversarial_examples(network, batch)
    passes = []
    network[1].register_forward_hook(lambda *_: passes.append(1))
    losses = losses_of(network)
    loss = only(losses, "adversarial", batch)
    assert passes == [1, 1, 1]
    assert torch.equal(losses.stationarity.x_adv, expected)
    assert all(parameter.grad is None for parameter in network.parameters())
    loss.backward()  # what the attack differentiated is whole
    assert all(parameter.grad is not None for parameter in network.parameters())
