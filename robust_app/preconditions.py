"""What the configuration of a run asks of its data, processes and device."""

from robust_app import method_settings, precision
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.errors import SettingError
from robust_app.execution import Eager


def check(config: Config, dataset: Dataset, world: World, execution: type[Eager]) -> None:
    """See that a run can be trained, as far as that shows before its network is made.

    Raises:
        UserError: a name is unknown, the method does not fit the rest of the configuration, the
            batch size not the processes or BatchNorm, the crops not the images, or the device not
            the precision or the execution.
    """
    method_settings.check(config)
    precision.check(config.precision, world.device)
    execution.check(world)
    if config.batch_size % world.size:
        raise SettingError(
            "batch_size",
            f"expected a multiple of the {world.size} processes, found {config.batch_size}",
        )
    if config.batch_norm and config.batch_size < 2:
        raise SettingError("batch_size", "expected at least 2 with batch_norm, found 1")
    largest = max(dataset.image_shape[1:])
    if config.augment and config.crop_padding > largest:  # more would leave nothing to see
        raise SettingError(
            "crop_padding",
            f"expected at most {largest} for images of {largest} pixels, "
            f"found {config.crop_padding}",
        )


def check_batch(config: Config, images: int) -> None:
    """See that there are as many training images, without those held out, as a batch takes.

    Raises:
        SettingError: there are fewer.
    """
    if images < config.batch_size:
        raise SettingError(
            "batch_size",
            f"expected at most the {images} training images, found {config.batch_size}",
        )
