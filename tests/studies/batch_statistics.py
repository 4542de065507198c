"""Which BatchNorm layer's batch statistics make single gradients of the certified loss so long.

    python -m tests.studies.batch_statistics RUN... --data-root DIR

From the network of each run's checkpoint, on the same batches of training images at ε_train: the
certified loss and the length of its gradient, with the batch's statistics in some of the layers
and the running ones in the others. Nothing is trained.
"""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from robust_app.batch_norm import batch_norms, clean_statistics
from robust_app.errors import UserError
from robust_app.interval import Interval
from robust_app.losses import certified_loss
from robust_app.training import Trainer
from tests.studies.gradient_lengths import Study, drawn, main, measure


def choices(layers: int) -> Mapping[str, set[int]]:
    """Which layers have the batch's statistics, by the names of the rows.

    >>> list(choices(3))
    ['all', 'all but layer 1', 'layer 1', 'layer 2', 'layer 3', 'none']
    """
    every = set(range(layers))
    single = {f"layer {index + 1}": {index} for index in range(layers)}
    return {"all": every, "all but layer 1": every - {0}, **single, "none": set()}


def carry_out(trainer: Trainer, count: int) -> dict[str, Tensor]:
    """Losses and lengths, ``(count, 2)``, of each choice of layers, on the same batches."""
    if trainer.stage.number > 0 or not batch_norms(trainer.network):
        raise UserError("RUN: expected a run that trains with BatchNorm, found one without")
    network, layers = trainer.network.train(), batch_norms(trainer.network)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in choices(len(layers))}
    for x, labels in drawn(trainer, count):

        def loss(x: Tensor = x, labels: Tensor = labels) -> Tensor:
            with clean_statistics(network, x):
                box = Interval.around(x, trainer.config.epsilon)
                return certified_loss(network, box, labels)

        for name, of_the_batch in choices(len(layers)).items():
            for index, layer in enumerate(layers):
                layer.statistics_frozen = index not in of_the_batch
            found[name].append(measure(network, loss))
    return {name: torch.tensor(values) for name, values in found.items()}


STUDY = Study("tests.studies.batch_statistics", __doc__, "the batch's statistics in", carry_out)

if __name__ == "__main__":
    main(STUDY, sys.argv[1:])
