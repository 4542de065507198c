"""What is stepped on: networks and their losses, and the ways to take a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mogd import Fixed, Priority, Threshold, UnbiasedMultiGradient
from robust_app import methods, models, recipes
from robust_app.fosc import Stationarity
from robust_app.losses import Objective
from robust_app.schedules import setting
from robust_app.steps import Batch, Losses
from tests.benchmarks.timing import Step

IMAGE = (1, 28, 28)
RECIPE = "mnist-dm-small"
EPOCH = 80  # within the ramp of ε, with both losses
LEARNING_RATE = 5e-4


@dataclass
class Problem:
    """A network and the losses of one batch, each made anew when it is called.

    Attributes:
        network: stepped on in place.
        losses: 0-dim, of the network as it is.
        priority: for mogd.
    """

    network: nn.Module
    losses: tuple[Callable[[], Tensor], ...]
    priority: Priority = field(default_factory=lambda: Fixed(0))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the network."""
        return list(self.network.parameters())

    def made(self) -> Iterator[Tensor]:
        """The losses, one at a time."""
        return (loss() for loss in self.losses)


def mlp() -> Problem:
    """Two regressions by a small MLP: the optimizer's own work shows most."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x, targets = torch.randn(64, 32), torch.randn(2, 64, 8)
    return Problem(
        network,
        tuple(
            lambda target=target: nn.functional.mse_loss(network(x), target) for target in targets
        ),
    )


def network_of(model: str) -> nn.Module:
    """A network of the paper for images of MNIST's size, the same each time."""
    torch.manual_seed(0)
    return models.build(model, IMAGE, classes=10)


def images(count: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    torch.manual_seed(1)
    return torch.rand(count, *IMAGE), torch.randint(10, (count,))


def joint(
    model: str,
    batch_size: int,
    wrap: Callable[[nn.Module], nn.Module] = lambda objective: objective,
) -> Problem:
    """The joint step of AdvIBP: FGSM from a random start, adversarial loss, IBP loss.

    Args:
        model: a key of :data:`robust_app.models.MODELS`.
        batch_size: images of the step.
        wrap: makes a module whose gradients are averaged over processes.
    """
    config = recipes.load(RECIPE)
    now = setting(config, EPOCH)
    network, (x, labels) = network_of(model), images(batch_size)
    batch = Batch.of_images(x, labels, torch.rand_like(x) * 2 - 1, torch.tensor(now.epsilon))
    method, stationarity = methods.find("advibp"), Stationarity()
    makes = Losses(wrap(Objective(network)), network, method, method.attack(config), stationarity)
    return Problem(
        network,
        tuple(lambda name=name: next(makes.of((name,), batch, now)) for name in method.losses),
        Threshold(stationarity, limit=config.fosc_maximum),
    )


def weighted_sum(problem: Problem) -> Step:
    """What one writes without mogd: add the losses up, differentiate once, step with Adam."""
    optimizer = torch.optim.Adam(problem.parameters, lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(problem.made())).sum().backward()
        optimizer.step()

    return step


def accumulated(problem: Problem) -> Step:
    """The same with a backward pass for each loss: one graph at a time, as mogd has it."""
    optimizer = torch.optim.Adam(problem.parameters, lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        for loss in problem.made():
            loss.backward()
        optimizer.step()

    return step


def mogd(problem: Problem) -> Step:
    """The paper's rule, with the paper's priority where there is one, and Adam."""
    optimizer = UnbiasedMultiGradient(
        problem.parameters, torch.optim.Adam, lr=LEARNING_RATE, priority=problem.priority
    )
    return lambda: optimizer.step(problem.made)


def torchjd(problem: Problem, aggregator: str) -> Step:
    """TorchJD as its documentation shows it: ``backward``, ``jac_to_grad``, step with Adam.

    Args:
        problem: stepped on in place.
        aggregator: name of a class in ``torchjd.aggregation``.
    """
    optimizer = torch.optim.Adam(problem.parameters, lr=LEARNING_RATE)
    aggregate = torchjd_aggregation(problem.parameters, aggregator)

    def step() -> None:
        optimizer.zero_grad()
        aggregate(list(problem.made()))
        optimizer.step()

    return step


def torchjd_aggregation(
    parameters: list[nn.Parameter],
    aggregator: str,
    *,
    thrifty: bool = False,
) -> Callable[[list[Tensor]], None]:
    """From losses to ``.grad``, by TorchJD.

    Args:
        parameters: what all losses depend on.
        aggregator: name of a class in ``torchjd.aggregation``.
        thrifty: its ``optimize_gramian_computation``, which holds no copy of the Jacobian.
    """
    from torchjd import aggregation, autojac  # only the benchmarks need it

    rule = getattr(aggregation, aggregator)()

    def aggregate(losses: list[Tensor]) -> None:
        autojac.backward(losses, inputs=parameters)
        autojac.jac_to_grad(parameters, rule, optimize_gramian_computation=thrifty)

    return aggregate


AGGREGATORS = ("UPGrad", "MGDA", "PCGrad")
