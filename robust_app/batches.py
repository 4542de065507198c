"""Batches of images: drawn by index, as floats, augmented, on the device where the data live."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def as_float(x: Tensor) -> Tensor:
    """Pixels in [0, 1]: uint8 divided by 255 as float32, floats as they are; any shape.

    >>> as_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augment(x: Tensor, generator: torch.Generator, padding: int, horizontal_flip: bool) -> Tensor:
    """Shift each image at random by up to ``padding`` pixels, and flip it left to right or not.

    The shift is a crop at random from the image padded with zeros on every side.

    Args:
        x: images (n, C, H, W), of any dtype.
        padding: number of zeros on every side, at least 0.
        generator: on the device of ``x``.
        horizontal_flip: flip, with probability ½; not for digits, which become other symbols.

    Returns:
        A new tensor of the shape and dtype of ``x``.
    """
    n, channels, height, width = x.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=x.device)

    rows = draw(2 * padding + 1) + torch.arange(height, device=x.device)  # (n, H)
    columns = draw(2 * padding + 1) + torch.arange(width, device=x.device)  # (n, W)
    if horizontal_flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    padded = F.pad(x, [padding] * 4)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def shuffled_batches(
    count: int, batch_size: int, generator: torch.Generator, device: torch.device | str
) -> Iterator[Tensor]:
    """One epoch: index tensors (batch_size,) on ``device`` that draw from ``range(count)``.

    No index comes twice; those of an incomplete last batch do not come at all. The order depends
    on the generator, which may be on another device, and not on ``device``.

    >>> sum(len(batch) for batch in shuffled_batches(10, 4, torch.Generator(), "cpu"))
    8
    """
    order = torch.randperm(count, generator=generator, device=generator.device).to(device)
    last = count - batch_size
    return (order[start : start + batch_size] for start in range(0, last + 1, batch_size))
