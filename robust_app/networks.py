"""The network of a run: built from its configuration for its images."""

from torch import nn

from robust_app import models
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.initialization import ibp_initialization


def build_network(config: Config, dataset: Dataset, *, trainable: bool = False) -> nn.Sequential:
    """The network of a run.

    Args:
        config: names the model.
        dataset: the images it is for.
        trainable: as training begins, initialised from torch's current seed and with BatchNorm if
            the config asks for it; else as it is saved, without BatchNorm.

    Raises:
        UserError: if the model is unknown or the images do not fit it.
    """
    network = models.build(
        config.model,
        input_shape=dataset.image_shape,
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        batch_norm=trainable and config.batch_norm,
    )
    if trainable and config.ibp_initialization:
        ibp_initialization(network)
    return network
