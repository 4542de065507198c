"""What an epoch does beside its steps."""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from torch.utils.benchmark import timer  # the clock of its Timer: waits for a device

from robust_app import recipes, reporting
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.training import Trainer
from tests.benchmarks.effort import Effort
from tests.benchmarks.problems import EPOCH, IMAGE, RECIPE
from tests.benchmarks.report import Row, medians
from tests.benchmarks.timing import summary


def beside_the_steps(effort: Effort) -> Iterator[Row]:
    """Data, schedules, logging and progress of whole epochs, with and without held-out images."""
    dataset = random_images(effort.images)
    for held_out, aim in ((0, "≤ 2 %"), (effort.held_out, "")):
        config = dataclasses.replace(
            recipes.load(RECIPE), model=effort.small, batch_size=effort.batch, held_out=held_out
        )
        trainer = Trainer(config, dataset, World(0, 1, torch.device("cpu")))
        trainer.epochs_done = EPOCH
        seconds = timed(trainer, epochs=max(2, effort.few - 1))
        pairs = zip(seconds["epoch"], seconds["steps"], strict=True)
        shares = [(whole - steps) / whole for whole, steps in pairs]
        measured = f"with {held_out:,} held-out images measured" if held_out else "without held-out"
        yield Row(
            "epoch",
            f"{effort.small}, {effort.images:,} images, {measured}",
            "(epoch - its steps) ÷ epoch",
            summary(shares),
            effort.aim(aim),
            percent=True,
            seconds=medians(seconds),
        )


def random_images(count: int) -> Dataset:
    """Of MNIST's shape, as bytes in memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (count, *IMAGE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    return Dataset("random", x, labels, x[:10], labels[:10], classes=10)


def timed(trainer: Trainer, epochs: int) -> dict[str, list[float]]:
    """Seconds of each epoch, and of all steps in it: from the first loss to the new parameters."""
    begun: list[float] = []
    ended: list[float] = []
    make_losses = trainer.stage.losses.of

    def of(*arguments: Any) -> Any:
        begun.append(timer())
        return make_losses(*arguments)

    trainer.stage.losses.of = of  # type: ignore[method-assign]
    trainer.optimizer.register_step_post_hook(lambda *_: ended.append(timer()))
    seconds: dict[str, list[float]] = {"epoch": [], "steps": []}
    terminal = Console(file=io.StringIO(), force_terminal=True)
    with reporting.watcher(terminal, trainer.config.total_epochs) as watcher:
        for _ in range(epochs):
            begun.clear()
            ended.clear()
            start = timer()
            watcher.epoch(trainer.train_epoch(watcher))
            seconds["epoch"].append(timer() - start)
            steps = zip(begun, ended, strict=True)
            seconds["steps"].append(sum(after - before for before, after in steps))
    return seconds
