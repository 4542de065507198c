"""What an epoch trains on, and what is measured after it."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from robust_app import batches, methods
from robust_app.attacks import uniform_start
from robust_app.config import Config
from robust_app.distributed import World
from robust_app.evaluation import standard_and_certified


def training_batches(
    x: Tensor,
    labels: Tensor,
    start_shape: tuple[int, ...],
    config: Config,
    epoch: int,
    world: World,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's images, labels and random starts, a function of seed and epoch alone.

    Args:
        x: all training images, ``(n, C, H, W)``.
        labels: theirs, ``(n,)``.
        start_shape: of what is attacked, without the batch dimension.
        config: of the run.
        epoch: from 0.
        world: the processes that share each batch.
    """
    seed = int(np.random.SeedSequence([config.seed, epoch]).generate_state(1)[0])
    generator = torch.Generator(world.device).manual_seed(seed)
    for indices in batches.shuffled_batches(len(x), config.batch_size, generator, world.device):
        images = batches.as_float(x[indices])
        if config.augment:
            images = batches.augment(
                images, generator, config.crop_padding, horizontal_flip=config.horizontal_flip
            )
        shape = () if config.one_start_per_batch else (len(images), *start_shape)
        start = uniform_start(torch.empty(shape, device=world.device), generator)
        start = start.expand(len(images), *start_shape)
        yield world.share(images), world.share(labels[indices]), world.share(start)


def held_out_errors(
    network: nn.Module, x: Tensor, labels: Tensor, config: Config, world: World
) -> dict[str, float | None]:
    """Standard and verified error on held-out images in percent; None where none are held out.

    Args:
        network: in evaluation mode.
        x: the images, ``(n, C, H, W)``; the processes share them.
        labels: theirs, ``(n,)``.
        config: of the run.
        world: the processes.
    """
    if len(x) == 0:
        return {"standard_error": None, "verified_error": None}
    counts = standard_and_certified(
        network,
        world.share(x),
        world.share(labels),
        config.evaluation_epsilon,
        methods.verifiers_of(config),
    )
    wrong, proved = world.total(counts).tolist()
    return {
        "standard_error": 100 * wrong / len(x),
        "verified_error": 100 * (len(x) - proved) / len(x),
    }
