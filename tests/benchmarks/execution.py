"""Steps of training as they are, captured in CUDA graphs and compiled, also with fewer digits."""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from robust_app import precision, recipes
from robust_app.capture import EXECUTIONS
from robust_app.distributed import World
from robust_app.epochs import training_batches
from robust_app.execution import Report
from robust_app.schedules import setting
from robust_app.training import Trainer
from tests.benchmarks.effort import Effort
from tests.benchmarks.epoch import random_images
from tests.benchmarks.problems import EPOCH, RECIPE
from tests.benchmarks.report import Row, medians
from tests.benchmarks.timing import in_turns, ratios

LEAST = 0.1  # seconds: a step takes milliseconds
PLAIN = "eager float32"


def beside_eager_float32(effort: Effort) -> Iterator[Row]:
    """The joint step of AdvIBP in every execution and precision, and the weighted sum in each."""
    device = torch.device("cuda")
    for model, rounds in ((effort.small, effort.few), (effort.large, effort.few)):
        case = f"{model}, batch {effort.batch}"
        seconds = in_turns(
            {
                f"{kind} {digits}": step_of(model, "advibp", kind, digits, effort.batch, device)
                for kind in ("eager", "graph")
                for digits in precision.PRECISIONS
            },
            rounds,
            LEAST,
        )
        for name in list(seconds)[1:]:
            value = ratios(seconds[PLAIN], seconds[name])
            times = medians(seconds, PLAIN, name)
            yield Row("execution", case, f"{PLAIN} ÷ {name}", value, seconds=times)
        for kind in ("eager", "graph"):
            sides = {
                name: step_of(model, method, kind, "float32", effort.batch, device)
                for name, method in (("mogd", "advibp"), ("weighted sum", "weighted-sum"))
            }
            seconds = in_turns(sides, rounds, LEAST)
            value = ratios(seconds["mogd"], seconds["weighted sum"])
            figure = f"mogd ÷ weighted sum, {kind}"
            yield Row("execution", case, figure, value, seconds=medians(seconds))


def beside_eager_tf32(effort: Effort) -> Iterator[Row]:
    """The joint step of AdvIBP in every execution: compilers take their time before it."""
    device = torch.device("cuda")
    for model in (effort.small, effort.large):
        sides = {
            kind: step_of(model, "advibp", kind, "tf32", effort.batch, device)
            for kind in EXECUTIONS
        }
        seconds = in_turns(sides, effort.few, LEAST)
        for name in list(sides)[1:]:
            value = ratios(seconds["eager"], seconds[name])
            case = f"{model}, batch {effort.batch}, TF32"
            times = medians(seconds, "eager", name)
            yield Row("compile", case, f"eager ÷ {name}", value, seconds=times)


def step_of(
    model: str, method: str, execution: str, digits: str, batch_size: int, device: torch.device
) -> Callable[[], Report]:
    """A step of both losses, always of the same batch; gives what the step tells."""
    config = dataclasses.replace(
        recipes.load(RECIPE),
        model=model,
        method=method,
        precision=digits,
        batch_size=batch_size,
        held_out=0,
    )
    world = World(0, 1, device)
    trainer = Trainer(config, random_images(batch_size).to(device), world, EXECUTIONS[execution])
    now = setting(config, EPOCH)
    shape = trainer.input_shape
    batch = next(training_batches(trainer.x, trainer.labels, shape, config, EPOCH, world))

    def step() -> Report:
        with precision.products_in(digits):
            return trainer.run_step(now, *batch)

    return step
