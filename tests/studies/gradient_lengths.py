"""How long the certified loss's gradients are from one network, computed in several ways."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_app import batches, checkpoint, data
from robust_app.distributed import World
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer

OUTSIZED = 3
"""A gradient that is longer than so many medians is outsized."""


@dataclass(frozen=True)
class Study:
    """A way to tabulate what several ways make of the same batches.

    Attributes:
        name: of its module.
        about: what ``--help`` says.
        ways: the head of the first column.
        carried_out: losses and lengths, ``(count, 2)``, by the names of the ways.
    """

    name: str
    about: str | None
    ways: str
    carried_out: Callable[[Trainer, int], Mapping[str, Tensor]]


def drawn(trainer: Trainer, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of training images in [0, 1] with their labels, by the run's seed."""
    random = torch.Generator().manual_seed(trainer.config.seed)
    for _ in range(count):
        rows = torch.randint(len(trainer.x), (trainer.config.batch_size,), generator=random)
        yield batches.as_float(trainer.x[rows]), trainer.labels[rows]


def measure(network: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """A loss of the network and the 2-norm of its gradient.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> measure(layer, lambda: 3 * layer.weight.sum() - 3 * layer.weight.detach().sum())
    (0.0, 3.0)
    """
    network.zero_grad()
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return value.item(), nn.utils.get_total_norm(gradients).item()


def table(found: Mapping[str, Tensor], ways: str) -> str:
    """Lines of a Markdown table: medians and largest, and how many gradients are outsized."""
    lines = [
        f"| {ways} | loss: median | largest | gradient: median | largest | outsized |",
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


def main(study: Study, arguments: Sequence[str]) -> None:
    """Print a table for each run, of the network in its checkpoint."""
    parser = argparse.ArgumentParser(prog=f"python -m {study.name}", description=study.about)
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
        rows = table(study.carried_out(trainer, given.batches), study.ways)
        print(f"{path}, after {trainer.epochs_done} epochs\n\n{rows}\n")
