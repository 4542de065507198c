"""What bf16 makes of the certified loss and of its gradient.

    python -m tests.studies.rounding RUN... --data-root DIR

From the network of each run's checkpoint, on the same batches of training images at ε_train, with
the first layer's statistics frozen if the run's last epoch had them so: in float32, as
``precision="bf16"`` trains, and with the first layer's products in bf16 too. Nothing is trained.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from robust_app.batch_norm import clean_statistics, freeze_first
from robust_app.errors import UserError
from robust_app.folding import merged
from robust_app.interval import Interval
from robust_app.losses import Objective, certified_loss
from robust_app.precision import of_losses
from robust_app.schedules import setting
from robust_app.training import Trainer
from tests.studies.gradient_lengths import Study, drawn, main, measure

Loss = Callable[[nn.Module], Tensor]


def ways(network: nn.Module) -> Mapping[str, Callable[[Loss], Tensor]]:
    """How to take a loss of the network, by the names of the rows."""
    objective, device = Objective(network), torch.device("cpu")

    def everywhere(loss: Loss) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return loss(network)

    return {
        "float32": of_losses(objective, "float32", device),
        "bf16, the first layer's in float32": of_losses(objective, "bf16", device),
        "bf16": everywhere,
    }


def carry_out(trainer: Trainer, count: int) -> dict[str, Tensor]:
    """Losses and lengths, ``(count, 2)``, of each way, on the same batches."""
    if trainer.stage.number > 0 or trainer.epochs_done == 0:
        raise UserError("RUN: expected a run within its first stage, after an epoch at least")
    config, network = trainer.config, trainer.network.train()
    last = setting(config, trainer.epochs_done - 1)
    freeze_first(network, last.first_batch_norm_frozen)
    by_name = ways(network)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in by_name}
    for x, labels in drawn(trainer, count):

        def certified(layers: nn.Module, x: Tensor = x, labels: Tensor = labels) -> Tensor:
            with clean_statistics(layers, x):
                return certified_loss(merged(layers), Interval.around(x, config.epsilon), labels)

        for name, way in by_name.items():
            found[name].append(measure(network, partial(way, certified)))
    return {name: torch.tensor(values) for name, values in found.items()}


STUDY = Study("tests.studies.rounding", __doc__, "products in", carry_out)

if __name__ == "__main__":
    main(STUDY, sys.argv[1:])
