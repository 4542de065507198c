"""Captured steps, rehearsed without a GPU: all but the capture itself is what runs on one."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robust_app.capture import EXECUTIONS, WARM_UP, Captured
from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.execution import Eager, Report
from robust_app.reporting import Silent
from robust_app.schedules import Phase, Setting
from robust_app.training import Trainer
from tests.robust_app.runs import (
    A_MOMENT,
    ALONE,
    CHANGING,
    few_digits,
    full_strength,
    parameters_of,
)


class Rehearsed(Captured):
    """Replays by running the step again on the same buffers, into the same report."""

    captures = False  # of the optimizer: the CPU has no state that is fit for it

    @classmethod
    def check(cls, world: World) -> None:
        """Anywhere."""

    def warm_up(self, run: Callable[[], Report]) -> Report:
        return run()

    def capture(self, run: Callable[[], Report]) -> tuple[Callable[[], object], Report]:
        report: Report = {}
        return lambda: report.update(run()), report


def given_to_steps(settings: list[Setting]) -> list[tuple[Phase, object, tuple[Tensor, ...]]]:
    """What the steps of some moments are given, by a rehearsal on batches 0, 1, 2, …"""
    seen = []

    def step(phase, values, *inputs) -> Report:
        seen.append((phase, values, inputs, [part.clone() for part in inputs], dict(vars(values))))
        return {"learning_rate": values.learning_rate.clone(), "x": inputs[0].sum()}

    run = Rehearsed(step, torch.device("cpu"))
    for number, now in enumerate(settings):
        report = run(now, *torch.full((3, 2), float(number)))
        assert report["learning_rate"] == torch.tensor(now.learning_rate)
        assert report["x"] == 2 * number  # of this step, not of the one before
    return seen


def test_every_step_of_a_structure_reads_the_same_memory():
    """A replay sees nothing else: neither new tensors nor the numbers of the host."""
    moments = [
        dataclasses.replace(A_MOMENT, epsilon=0.01 * n, learning_rate=0.1 / (n + 1))
        for n in range(6)
    ]
    (phase, values, inputs, *_), *others = given_to_steps(moments)
    assert phase is Phase.MAIN
    for _, other_values, other_inputs, *_ in others:
        assert other_values is values
        assert all(map(lambda one, two: one is two, inputs, other_inputs))
    assert all(
        isinstance(value, Tensor)
        for name, value in vars(values).items()
        if name not in ("crown_share", "box_regularizers")
    )


@pytest.mark.parametrize(
    "change",
    [
        {"phase": Phase.NATURAL},
        {"natural_weight": 1.0},
        {"crown_share": 0.5},
        {"first_batch_norm_frozen": True},
    ],
    ids=str,
)
def test_another_structure_has_memory_of_its_own(change):
    (_, first, *_), (_, second, *_) = given_to_steps(
        [A_MOMENT, dataclasses.replace(A_MOMENT, **change)]
    )
    assert first is not second


def test_a_structure_is_captured_after_its_warm_up_and_once():
    told = []

    class Told(Rehearsed):
        def warm_up(self, run: Callable[[], Report]) -> Report:
            told.append("warm up")
            return super().warm_up(run)

        def capture(self, run: Callable[[], Report]) -> tuple[Callable[[], object], Report]:
            told.append("capture")
            replay, report = super().capture(run)
            return lambda: (told.append("replay"), replay()), report

    run = Told(lambda *_: {}, torch.device("cpu"))
    later = dataclasses.replace(A_MOMENT, phase=Phase.NATURAL)
    for now in [A_MOMENT] * (WARM_UP + 3) + [later] * (WARM_UP + 1) + [A_MOMENT]:
        run(now, *torch.zeros(3, 2))
    first = ["warm up"] * WARM_UP + ["capture"] + ["replay"] * 3
    second = ["warm up"] * WARM_UP + ["capture", "replay"]
    assert told == [*first, *second, "warm up"]


@pytest.mark.parametrize("name", CHANGING)
def test_rehearsed_steps_train_as_eager_ones_do(name):
    config = CHANGING[name]
    trainers = [Trainer(config, few_digits(), ALONE, kind) for kind in (Eager, Rehearsed)]
    start = parameters_of(trainers[0]).clone()
    metrics = [[trainer.train_epoch(Silent()) for _ in range(3)] for trainer in trainers]
    eager, rehearsed = map(parameters_of, trainers)
    # The numbers are float32 there, not float64: Adam turns a rounding near 0 into a whole step.
    assert (rehearsed - eager).norm() < 1e-2 * (eager - start).norm()
    for one, other in zip(*metrics, strict=True):
        assert one.keys() == other.keys()
        assert one["epsilon"] == other["epsilon"]
        for key in one.keys() - {"seconds", "phase"}:
            assert other[key] == pytest.approx(one[key], rel=1e-2, abs=1e-3), key


def test_a_run_resumes_under_another_execution():
    config = full_strength("advibp", epochs=2)
    unbroken = Trainer(config, few_digits(), ALONE)
    first = Trainer(config, few_digits(), ALONE, Rehearsed)
    second = Trainer(config, few_digits(), ALONE)
    for _ in range(2):
        unbroken.train_epoch(Silent())
    first.train_epoch(Silent())
    second.load_state_dict(first.state_dict())
    second.train_epoch(Silent())
    torch.testing.assert_close(parameters_of(second), parameters_of(unbroken), rtol=0, atol=1e-4)


def test_graphs_are_for_one_process_on_a_gpu():
    with pytest.raises(UserError, match=r"^--execution: graph needs a GPU, found cpu$"):
        Captured.check(ALONE)
    with pytest.raises(UserError, match=r"^--execution: graph is for one process"):
        Captured.check(World(0, 2, torch.device("cuda")))
    Captured.check(World(0, 1, torch.device("cuda")))
    with pytest.raises(UserError, match="needs a GPU"):
        Trainer(full_strength("advibp"), few_digits(), ALONE, Captured)
    assert set(EXECUTIONS) == {"eager", "graph", "compile"}
