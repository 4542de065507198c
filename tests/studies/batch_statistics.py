"""Which BatchNorm layer's batch statistics make single gradients of the certified loss so long.

    python -m tests.studies.batch_statistics RUN... --data-root DIR

From the network of each run's checkpoint, on the same batches of training images at ε_train: the
certified loss and the length of its gradient, with the batch's statistics in some of the layers
and the running ones in the others. Nothing is trained.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_app import batches, checkpoint, data
from robust_app.batch_norm import batch_norms, clean_statistics
from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.interval import Interval
from robust_app.losses import certified_loss
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer

OUTSIZED = 3
"""A gradient that is longer than so many medians is outsized."""


def choices(layers: int) -> Mapping[str, set[int]]:
    """Which layers have the batch's statistics, by the names of the rows.

    >>> list(choices(3))
    ['all', 'all but layer 1', 'layer 1', 'layer 2', 'layer 3', 'none']
    """
    every = set(range(layers))
    single = {f"layer {index + 1}": {index} for index in range(layers)}
    return {"all": every, "all but layer 1": every - {0}, **single, "none": set()}


def measure(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> tuple[float, float]:
    """The certified loss of a batch of images in [0, 1] and the 2-norm of its gradient."""
    network.zero_grad()
    with clean_statistics(network, x):
        loss = certified_loss(network, Interval.around(x, epsilon), labels)
        loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return loss.item(), nn.utils.get_total_norm(gradients).item()


def study(trainer: Trainer, count: int) -> dict[str, Tensor]:
    """Losses and lengths, ``(count, 2)``, of each choice of layers, on the same batches."""
    if trainer.stage > 0 or not batch_norms(trainer.network):
        raise UserError("RUN: expected a run that trains with BatchNorm, found one without")
    random = torch.Generator().manual_seed(trainer.config.seed)
    network, layers = trainer.network.train(), batch_norms(trainer.network)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in choices(len(layers))}
    for _ in range(count):
        rows = torch.randint(len(trainer.x), (trainer.config.batch_size,), generator=random)
        x, labels = batches.as_float(trainer.x[rows]), trainer.labels[rows]
        for name, of_the_batch in choices(len(layers)).items():
            for index, layer in enumerate(layers):
                layer.statistics_frozen = index not in of_the_batch
            found[name].append(measure(network, x, labels, trainer.config.epsilon))
    return {name: torch.tensor(values) for name, values in found.items()}


def table(found: Mapping[str, Tensor]) -> str:
    """Lines of a Markdown table: medians and largest, and how many gradients are outsized."""
    lines = [
        "| the batch's statistics in | loss: median | largest "
        "| gradient: median | largest | outsized |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, values in found.items():
        (loss, length), (most, longest) = values.median(0).values, values.amax(0)
        outsized = int((values[:, 1] > OUTSIZED * length).sum())
        lines.append(
            f"| {name} | {loss:.3f} | {most:.2f} | {length:.1f} | {longest:.1f} "
            f"| {outsized} of {len(values)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print a table for each run."""
    parser = argparse.ArgumentParser(prog="tests.studies.batch_statistics", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--batches", type=int, default=150)
    given = parser.parse_args(arguments)
    if given.batches < 1:
        parser.error(f"--batches: expected at least 1, found {given.batches}")
    for path in given.runs:
        directory = RunDirectory(path)
        config = directory.config()
        trainer = Trainer(
            config, data.load(config.dataset, given.data_root), World(0, 1, torch.device("cpu"))
        )
        trainer.load_state_dict(checkpoint.load(directory.checkpoint_file))
        rows = table(study(trainer, given.batches))
        print(f"{path}, after {trainer.epochs_done} epochs\n\n{rows}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
