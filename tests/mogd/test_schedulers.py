"""Every scheduler of torch.optim.lr_scheduler drives the optimizer as it drives the bare base."""

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from mogd import Constant, UnbiasedMultiGradient

SCHEDULERS = {
    scheduler
    for name, scheduler in vars(lr_scheduler).items()
    if inspect.isclass(scheduler)
    and issubclass(scheduler, lr_scheduler.LRScheduler)
    and not name.startswith("_")
    and scheduler is not lr_scheduler.LRScheduler
} | {swa_utils.SWALR}


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    decay = lr_scheduler.CosineAnnealingLR(optimizer, 6)
    return lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[3])


MAKERS = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    lr_scheduler.ConstantLR: lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR: lr_scheduler.LinearLR,
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    lr_scheduler.SequentialLR: sequential,
    lr_scheduler.PolynomialLR: lr_scheduler.PolynomialLR,
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    lr_scheduler.ChainedScheduler: chained,
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    lr_scheduler.CosineAnnealingWarmRestarts: (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3)
    ),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    swa_utils.SWALR: lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
BASES = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})]
STEPS = 10


def history(optimizer: torch.optim.Optimizer, scheduler, parameter: Tensor, *, multi: bool):
    """What the scheduler wrote into the groups and where the parameter went, step by step."""
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [(parameter - 1).square().sum(), (parameter + step).square().sum()]
        if multi:
            optimizer.backward(losses)
        else:
            for loss in losses:
                loss.backward()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(step % 4)
        else:
            scheduler.step()
        group = optimizer.param_groups[0]
        momentum = group.get("momentum", group.get("betas"))
        seen.append((group["lr"], momentum, parameter.tolist(), scheduler.get_last_lr()))
    return seen


@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS, key=lambda kind: kind.__name__))
def test_scheduler_drives_as_it_drives_the_base(scheduler, base, options):
    parameter = nn.Parameter(torch.tensor([0.5, -0.25]))
    ours = UnbiasedMultiGradient([parameter], base, rule=Constant((1.0, 1.0)), lr=0.05, **options)
    found = history(ours, MAKERS[scheduler](ours), parameter, multi=True)

    twin = nn.Parameter(torch.tensor([0.5, -0.25]))
    bare = base([twin], lr=0.05, **options)
    expected = history(bare, MAKERS[scheduler](bare), twin, multi=False)

    assert found == expected
    assert len({lr for lr, *_ in found}) > 1  # it did schedule
    assert ours.base.param_groups[0]["lr"] == found[-1][0]


@pytest.mark.parametrize("scheduler", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_cycled_momentum_leaves_the_moments_alone(scheduler, base, options):
    """These rewrite `momentum` or `betas` of the groups, where our decays must not be found."""
    parameter = nn.Parameter(torch.tensor([0.5, -0.25]))
    ours = UnbiasedMultiGradient([parameter], base, moment_decay=(0.5, 0.75), **options)
    key = "momentum" if options else "betas"
    before = ours.param_groups[0][key]
    history(ours, MAKERS[scheduler](ours), parameter, multi=True)
    assert ours.param_groups[0][key] != before
    assert ours.moment_decay == (0.5, 0.75)
    assert ours.state_dict()["moment_decay"] == [0.5, 0.75]


def test_scheduler_resumes_with_the_optimizer():
    def run(steps: int, saved=None):
        parameter = nn.Parameter(torch.tensor([0.5, -0.25]))
        optimizer = UnbiasedMultiGradient([parameter], lr=0.1)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20)
        if saved is not None:
            parameter.data.copy_(saved[0])
            optimizer.load_state_dict(saved[1])
            scheduler.load_state_dict(saved[2])
        for _ in range(steps):
            optimizer.step(lambda: [parameter.square().sum(), (parameter - 3).abs().sum()])
            scheduler.step()
        return parameter.detach(), optimizer.state_dict(), scheduler.state_dict()

    whole, halves = run(8), run(4, run(4))
    assert torch.equal(halves[0], whole[0])
    assert halves[1]["param_groups"] == whole[1]["param_groups"]


def test_weight_averaging():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = UnbiasedMultiGradient(model.parameters(), lr=0.1)
    average = swa_utils.AveragedModel(model)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05)
    x, visited = torch.randn(8, 2), []
    for _ in range(4):
        optimizer.step(lambda: [model(x).square().mean(), (model(x) - 1).square().mean()])
        scheduler.step()
        average.update_parameters(model)
        visited.append(model[0].weight.detach().clone())
    swa_utils.update_bn([x], average)
    torch.testing.assert_close(average.module[0].weight, torch.stack(visited).mean(0))
    assert not torch.equal(visited[0], visited[-1])
