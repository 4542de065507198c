import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_app import attacks
from robust_app.attacks import ANYTHING, falsified, fgsm, pgd, uniform_start
from robust_app.certificates import certified

LABELS = torch.tensor([0, 1, 2, 0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relu_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def images(seed=0, batch=4):
    return torch.rand(batch, 1, 2, 3, generator=generator(seed), dtype=torch.float64)


def two_classes(weight, bias=0.0):
    """Logits (w x + b, 0): the l_inf distance to the boundary is |w x + b| / ||w||_1."""
    layer = nn.Linear(len(weight), 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.tensor(weight), torch.zeros(len(weight))]))
        layer.bias.copy_(torch.tensor([bias, 0.0]))
    return layer


class Recorder(nn.Module):
    """Keeps what a network is asked."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.asked = []

    def forward(self, x):
        self.asked.append(x.detach().clone())
        return self.network(x)


@given(
    seed=st.integers(0, 1000),
    epsilon=st.floats(0, 1.5),
    steps=st.integers(1, 4),
    step_size=st.floats(0, 2),
)
@settings(max_examples=30, deadline=None)
def test_iterates_stay_in_the_ball_and_the_image_domain(seed, epsilon, steps, step_size):
    x = images(seed)
    network = Recorder(relu_network(seed))
    start = uniform_start(x, generator(seed))
    x_adv = pgd(network, x, LABELS, epsilon, start=start, steps=steps, step_size=step_size)
    assert len(network.asked) == steps
    for iterate in (*network.asked, x_adv):
        assert iterate.shape == x.shape
        assert ((iterate - x).abs() <= epsilon + 1e-12).all()
        assert ((iterate >= 0) & (iterate <= 1)).all()


def test_the_attack_begins_at_the_start_given():
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    network = Recorder(two_classes([1.0, -1.0]))
    start = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    pgd(network, x, torch.tensor([0]), 0.2, start=start, steps=1, step_size=0.1)
    torch.testing.assert_close(network.asked[0], torch.tensor([[0.7, 0.4]], dtype=torch.float64))


@given(seed=st.integers(0, 1000), epsilon=st.floats(0.01, 0.5))
@settings(max_examples=20, deadline=None)
def test_on_a_linear_classifier_the_optimum_is_reached(seed, epsilon):
    """The worst point is the corner against the weights of the label, cut at 0 and 1."""
    x = images(seed).flatten(1)
    weight = torch.randn(6, generator=generator(seed))
    network = two_classes(weight.tolist())
    labels = torch.tensor([0, 0, 1, 1])
    towards = torch.where(labels[:, None] == 0, -weight.sign(), weight.sign())
    expected = (x + epsilon * towards).clamp(0, 1)
    start = uniform_start(x, generator(seed))
    x_adv = pgd(network, x, labels, epsilon, start=start, steps=8, step_size=epsilon / 4)
    torch.testing.assert_close(x_adv, expected)


def test_more_steps_raise_the_loss():
    x, network = images(), relu_network()
    start = uniform_start(x, generator())

    def loss(x):
        return nn.functional.cross_entropy(network(x), LABELS).item()

    first = pgd(network, x, LABELS, 0.3, start=start, steps=1, step_size=0.05)
    last = pgd(network, x, LABELS, 0.3, start=start, steps=10, step_size=0.05)
    assert loss(x + 0.3 * start) < loss(first) < loss(last)


@given(seed=st.integers(0, 1000), epsilon=st.floats(0, 0.5))
@settings(max_examples=20, deadline=None)
def test_fgsm_is_pgd_with_one_step(seed, epsilon):
    x, network = images(seed), relu_network(seed)
    start = uniform_start(x, generator(seed))
    one = fgsm(network, x, LABELS, epsilon, start=start, step_size=1.25 * epsilon)
    same = pgd(network, x, LABELS, epsilon, start=start, steps=1, step_size=1.25 * epsilon)
    assert torch.equal(one, same)


def test_epsilon_and_step_size_may_be_tensors():
    x, network = images(), relu_network()
    start = uniform_start(x, generator())
    epsilon = torch.tensor(0.25, dtype=torch.float64)
    numbers = fgsm(network, x, LABELS, 0.25, start=start, step_size=0.3125)
    tensors = fgsm(network, x, LABELS, epsilon, start=start, step_size=1.25 * epsilon)
    assert torch.equal(numbers, tensors)
    found = [
        falsified(network, x, LABELS, e, steps=2, restarts=1, generator=generator())
        for e in (0.25, epsilon)
    ]
    assert torch.equal(*found)


@given(seed=st.integers(0, 1000), steps=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_iterates_stay_in_a_box_with_a_radius_for_each_entry(seed, steps):
    center = 4 * images(seed) - 2  # no pixels: below 0 and above 1
    radius = images(seed + 1)
    network = Recorder(relu_network(seed))
    start = uniform_start(center, generator(seed))
    x_adv = pgd(
        network,
        center,
        LABELS,
        radius,
        start=start,
        steps=steps,
        step_size=0.7 * radius,
        domain=ANYTHING,
    )
    torch.testing.assert_close(network.asked[0], center + radius * start)
    for iterate in (*network.asked, x_adv):
        assert ((iterate - center).abs() <= radius + 1e-12).all()
    assert ((x_adv < 0) | (x_adv > 1)).any()
    moved = (x_adv - network.asked[-1]).abs()
    assert (moved <= 0.7 * radius + 1e-12).all()


def test_a_domain_of_ones_own_is_kept():
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    x_adv = fgsm(
        two_classes([1.0, -1.0]),
        x,
        torch.tensor([0]),
        0.4,
        start=torch.zeros_like(x),
        step_size=0.4,
        domain=(0.3, 0.8),
    )
    torch.testing.assert_close(x_adv, torch.tensor([[0.3, 0.8]], dtype=torch.float64))


def test_parameters_keep_their_gradients():
    x, network = images(), relu_network()
    parameters = list(network.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    x_adv = pgd(
        network, x, LABELS, 0.1, start=uniform_start(x, generator()), steps=3, step_size=0.05
    )
    falsified(network, x, LABELS, 0.1, steps=3, restarts=1, generator=generator())
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None


def test_the_input_is_left_as_it_is():
    x, network = images(), relu_network()
    before = x.clone()
    start = uniform_start(x, generator())
    pgd(network, x, LABELS, 0.1, start=start, steps=3, step_size=0.05)
    falsified(network, x, LABELS, 0.1, steps=3, restarts=1, generator=generator())
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_an_attack_needs_no_gradient_mode_of_the_caller():
    x, network = images(), relu_network()
    start = uniform_start(x, generator())
    expected = pgd(network, x, LABELS, 0.1, start=start, steps=3, step_size=0.05)
    with torch.no_grad():
        x_adv = pgd(network, x, LABELS, 0.1, start=start, steps=3, step_size=0.05)
    assert torch.equal(x_adv, expected)


def test_uniform_start_covers_the_ball_evenly_and_follows_the_generator():
    x = torch.zeros(100, 100)
    start = uniform_start(x, generator(3))
    assert start.shape == x.shape
    assert start.dtype == x.dtype
    assert -1 <= start.min() < -0.99
    assert 0.99 < start.max() <= 1
    assert start.mean().abs() < 0.02
    assert (start**2).mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert torch.equal(start, uniform_start(x, generator(3)))
    assert not torch.equal(start, uniform_start(x, generator(4)))


# --- falsified


@pytest.mark.parametrize("steps", [1, 7])
def test_a_linear_model_is_falsified_just_beyond_its_distance(steps):
    network = two_classes([1.0, -2.0, 3.0, 2.0], bias=-1.2)
    x = torch.full((1, 4), 0.5, dtype=torch.float64)  # w x + b = 0.8, ||w||_1 = 8
    distance = 0.1

    def found(epsilon):
        result = falsified(
            network, x, torch.tensor([0]), epsilon, steps=steps, restarts=1, generator=generator()
        )
        return result.tolist()

    assert found(0.999 * distance) == [False]
    assert found(1.001 * distance) == [True]


def test_what_is_misclassified_already_is_falsified_without_an_attack():
    network = Recorder(two_classes([1.0, 1.0], bias=-0.1))
    x = torch.full((2, 2), 0.5, dtype=torch.float64)
    labels = torch.tensor([1, 1])
    result = falsified(network, x, labels, 0.0, steps=2, restarts=3, generator=generator())
    assert result.tolist() == [True, True]
    assert len(network.asked) == 1


def test_an_example_is_attacked_until_broken():
    """One is wrong from the outset, one breaks at the first step, one never does."""
    network = Recorder(two_classes([1.0, 1.0], bias=-1.0))
    x = torch.tensor([[0.2, 0.2], [0.501, 0.501], [0.9, 0.9]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0])
    of_two_restarts = torch.empty(3, 2, 2, dtype=torch.float64)
    start_far_from_the_boundary = next(
        seed
        for seed in range(100)
        if (uniform_start(of_two_restarts, generator(seed))[1, 0] > 0.5).all()
    )
    result = falsified(
        network,
        x,
        labels,
        0.1,
        steps=2,
        restarts=2,
        generator=generator(start_far_from_the_boundary),
    )
    assert result.tolist() == [True, True, False]
    # Clean; start, one step, two steps; the same for the second start.
    assert [len(asked) for asked in network.asked] == [3, 2, 2, 1, 1, 1, 1]


class Notch(nn.Module):
    """Wrong for pixels in (0.52, 0.54) alone."""

    def forward(self, x):
        return torch.cat([(x - 0.53).abs() - 0.01, torch.zeros_like(x)], 1)


def test_every_iterate_counts_the_start_included():
    """The one step is as long as 2.5 epsilon and ends at 0.4 or 0.6, beside the notch."""
    x = torch.tensor([[0.5]], dtype=torch.float64)
    seeds = range(40)
    hits = {seed for seed in seeds if 0.2 < uniform_start(x, generator(seed)).item() < 0.4}
    found = {
        seed
        for seed in seeds
        if falsified(
            Notch(), x, torch.tensor([0]), 0.1, steps=1, restarts=1, generator=generator(seed)
        ).item()
    }
    assert hits
    assert found == hits


def test_many_restarts_are_drawn_for_a_part_of_the_images_at_a_time(monkeypatch):
    network = two_classes([1.0, -1.0, 0.5], bias=0.0)
    x = torch.rand(5, 3, generator=generator(5), dtype=torch.float64)
    labels = torch.zeros(5, dtype=torch.int64)
    sizes = []

    def drawn(like, source):
        sizes.append(like.numel())
        return uniform_start(like, source)

    def verdicts():
        return falsified(network, x, labels, 0.2, steps=2, restarts=4, generator=generator(7))

    monkeypatch.setattr(attacks, "uniform_start", drawn)
    at_once = verdicts()
    monkeypatch.setattr(attacks, "_STARTS_AT_ONCE", 25)  # two images' are 24
    assert torch.equal(verdicts(), at_once)
    assert sizes == [60, 24, 24, 12]


@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=6), restarts=st.integers(1, 3))
def test_the_starts_are_the_same_in_however_many_parts_the_images_come(parts, restarts):
    """Also where some images fall before others have begun."""
    network = Recorder(two_classes([1.0, -1.0, 0.5], bias=0.0))
    x = torch.rand(sum(parts), 3, generator=generator(5), dtype=torch.float64)
    labels = torch.zeros(len(x), dtype=torch.int64)

    def asked(sizes):
        network.asked.clear()
        source = generator(7)
        verdicts = [
            falsified(network, images, classes, 0.05, steps=1, restarts=restarts, generator=source)
            for images, classes in zip(x.split(sizes), labels.split(sizes), strict=True)
        ]
        return torch.cat(verdicts), {
            tuple(row) for batch in network.asked for row in batch.tolist()
        }

    verdicts, points = asked(parts)
    all_verdicts, all_points = asked([len(x)])
    assert torch.equal(verdicts, all_verdicts)
    assert points == all_points


def test_restarts_begin_at_other_points():
    x = torch.tensor([[0.5]], dtype=torch.float64)
    network = Recorder(Notch())
    result = falsified(
        network, x, torch.tensor([0]), 0.1, steps=1, restarts=100, generator=generator()
    )
    assert result.item()
    assert len(network.asked) < 100  # the search ends with the hit


@given(seed=st.integers(0, 1000), epsilon=st.floats(0, 0.4))
@settings(max_examples=30, deadline=None)
def test_nothing_certified_is_falsified(seed, epsilon):
    x, network = images(seed, batch=16), relu_network(seed)
    labels = network(x).argmax(1)
    proven = certified(network, x, labels, epsilon)
    broken = falsified(network, x, labels, epsilon, steps=5, restarts=2, generator=generator())
    assert not (proven & broken).any()


def test_some_images_are_certified_and_some_falsified():
    """So that the property above is not an empty one."""
    x, network = images(batch=64), relu_network()
    labels = network(x).argmax(1)
    assert certified(network, x, labels, 0.03).any()
    assert falsified(network, x, labels, 0.03, steps=5, restarts=2, generator=generator()).any()


# --- wrong use


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0, got -0.1"),
        ({"epsilon": math.nan}, "epsilon must be at least 0, got nan"),
        ({"step_size": -1.0}, "step_size must be at least 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"start": torch.zeros(4, 1, 1, 1)}, r"start must .* \(4, 1, 2, 3\), got \(4, 1, 1, 1\)"),
    ],
)
def test_pgd_refuses_wrong_arguments(changed, message):
    x = images()
    arguments = {"epsilon": 0.1, "start": torch.zeros_like(x), "steps": 1, "step_size": 0.1}
    with pytest.raises(ValueError, match=message):
        pgd(relu_network(), x, LABELS, **(arguments | changed))


def test_falsified_refuses_images_outside_of_the_domain():
    with pytest.raises(ValueError, match=r"x: expected images in \[0, 1\], found values from"):
        falsified(
            relu_network(),
            2 + images(),
            LABELS,
            epsilon=0.1,
            steps=1,
            restarts=1,
            generator=generator(),
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"restarts": 0}, "restarts must be at least 1"),
    ],
)
def test_falsified_refuses_wrong_arguments(changed, message):
    arguments = {"epsilon": 0.1, "steps": 1, "restarts": 1, "generator": generator()}
    with pytest.raises(ValueError, match=message):
        falsified(relu_network(), images(), LABELS, **(arguments | changed))
