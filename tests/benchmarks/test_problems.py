"""What is timed is what the names say."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from tests.benchmarks import aggregation, problems
from tests.benchmarks.effort import QUICK
from tests.benchmarks.epoch import random_images, timed
from tests.benchmarks.memory import beside_the_largest_loss, peak

MODEL = "table-f-a"
WAYS = {
    "weighted sum": problems.weighted_sum,
    "a loss at a time": problems.accumulated,
    "mogd": problems.mogd,
    "UPGrad": lambda problem: problems.torchjd(problem, "UPGrad"),
    "MGDA": lambda problem: problems.torchjd(problem, "MGDA"),
    "PCGrad": lambda problem: problems.torchjd(problem, "PCGrad"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make", [problems.mlp, lambda: problems.joint(MODEL, 4)], ids=["mlp", "joint"]
)
def test_every_way_steps_the_network(way, make):
    if way not in ("weighted sum", "a loss at a time", "mogd"):
        pytest.importorskip("torchjd")
        pytest.importorskip("quadprog")
    problem = make()
    before = parameters_to_vector(problem.parameters).clone()
    step = WAYS[way](problem)
    step()
    step()
    after = parameters_to_vector(problem.parameters)
    assert after.isfinite().all()
    assert (after - before).norm() > 0


def test_all_sides_get_the_same_problem():
    one, other = (problems.joint(MODEL, 4) for _ in range(2))
    assert [loss().item() for loss in one.losses] == [loss().item() for loss in other.losses]
    assert len(one.losses) == 2


@pytest.mark.parametrize("count", aggregation.LOSSES)
def test_regressions_have_the_entries_and_losses_asked_for(count):
    parameters, losses = aggregation.regressions(10_000, count)
    assert sum(parameter.numel() for parameter in parameters) == 10_000
    assert len(losses()) == count
    gradients = [
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        for loss in losses()
    ]
    assert torch.linalg.matrix_rank(torch.stack(gradients)) == count


def test_the_peak_counts_what_lives_at_once():
    def call() -> None:
        first = torch.ones(1000, dtype=torch.float64)  # 8,000 bytes
        second = torch.ones(1000, dtype=torch.float64)
        del first, second
        torch.ones(1500, dtype=torch.float64)

    assert 16_000 <= peak(call) < 17_000


def test_lazy_losses_need_less_memory_than_a_list_of_them():
    values = [row.value.median for row in beside_the_largest_loss(QUICK)]
    assert len(values) == 6
    for set_aside, lazy, together in (values[:3], values[3:]):
        assert 0 < set_aside < lazy < together


def test_an_epoch_is_longer_than_its_steps():
    import dataclasses

    from robust_app import recipes
    from robust_app.training import Trainer
    from tests.robust_app.runs import ALONE

    config = dataclasses.replace(
        recipes.load(problems.RECIPE), model=MODEL, batch_size=16, held_out=16
    )
    trainer = Trainer(config, random_images(48), ALONE)
    trainer.epochs_done = problems.EPOCH
    seconds = timed(trainer, epochs=2)
    assert len(seconds["epoch"]) == 2
    for whole, steps in zip(seconds["epoch"], seconds["steps"], strict=True):
        assert 0 < steps < whole
