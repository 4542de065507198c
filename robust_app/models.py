"""The networks by name: data that describe them, and the builder of plain ``nn.Sequential``."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from robust_app.batch_norm import BatchNorm
from robust_app.errors import UserError, unknown
from robust_app.layers import Normalize
from robust_app.small_patches import Conv2d


class Conv(NamedTuple):
    """A square convolution with padding 1, then ReLU."""

    channels: int
    kernel: int
    stride: int


class Architecture(NamedTuple):
    """The hidden layers of a network: convolutions, then dense layers.

    Attributes:
        description: for the user.
        layers: all but the last in the paper's notation, separated by commas: "Conv k w×h+s" is a
            convolution to k channels with a square kernel (w = h), stride s and padding 1, "FC n"
            a fully connected layer to n units; a ReLU follows each.

    >>> MODELS["dm-small"].layers
    'Conv 16 4×4+2, Conv 32 4×4+1, FC 100'
    >>> MODELS["dm-small"].convolutions, MODELS["dm-small"].dense
    ([Conv(channels=16, kernel=4, stride=2), Conv(channels=32, kernel=4, stride=1)], [100])
    """

    description: str
    layers: str

    @property
    def convolutions(self) -> list[Conv]:
        """In their order."""
        found = re.findall(r"Conv (\d+) (\d)×\2\+(\d)", self.layers)
        return [Conv(*map(int, numbers)) for numbers in found]

    @property
    def dense(self) -> list[int]:
        """The units of each fully connected layer, in their order."""
        return [int(units) for units in re.findall(r"FC (\d+)", self.layers)]


# The paper leaves the padding open; 1 is what its sources [8, 31] use for Table E.
MODELS: Mapping[str, Architecture] = {
    "dm-small": Architecture(
        "the paper's DM-Small (Table E)", "Conv 16 4×4+2, Conv 32 4×4+1, FC 100"
    ),
    "dm-medium": Architecture(
        "the paper's DM-Medium (Table E)",
        "Conv 32 3×3+1, Conv 32 4×4+2, Conv 64 3×3+1, Conv 64 4×4+2, FC 512, FC 512",
    ),
    "dm-large": Architecture(
        "the paper's DM-Large (Table E)",
        "Conv 64 3×3+1, Conv 64 3×3+1, Conv 128 3×3+2, Conv 128 3×3+1, Conv 128 3×3+1, FC 512",
    ),
    "dm-small-strided": Architecture(
        "what the paper's authors evaluated as DM-Small on MNIST",
        "Conv 16 4×4+2, Conv 32 4×4+2, FC 100",
    ),
    "cnn7": Architecture(
        "CNN7 of Shi et al. 2021, DM-Large's shapes, for use with BatchNorm",
        "Conv 64 3×3+1, Conv 64 3×3+1, Conv 128 3×3+2, Conv 128 3×3+1, Conv 128 3×3+1, FC 512",
    ),
    "cnn-small": Architecture(
        "the paper's CNN-Small (Table A)", "Conv 16 3×3+2, Conv 32 3×3+1, FC 512"
    ),
    "cnn-medium": Architecture(
        "the paper's CNN-Medium (Table A)",
        "Conv 32 3×3+2, Conv 64 3×3+1, Conv 128 3×3+1, Conv 256 3×3+1, FC 512, FC 512",
    ),
    "cnn-large": Architecture(
        "the paper's CNN-Large (Table A)",
        "Conv 64 3×3+2, Conv 64 3×3+1, Conv 128 3×3+1, Conv 256 3×3+1, Conv 256 3×3+1, FC 512",
    ),
    **{
        f"table-f-{letter.lower()}": Architecture(f"the paper's {letter} (Table F)", hidden_layers)
        for letter, hidden_layers in {
            "A": "Conv 8 3×3+2, Conv 16 3×3+1, FC 100",
            "B": "Conv 16 3×3+2, Conv 32 3×3+1, FC 100",
            "C": "Conv 32 3×3+2, Conv 64 3×3+1, FC 100",
            "D": "Conv 8 4×4+2, Conv 16 4×4+1, FC 512",
            "E": "Conv 16 4×4+2, Conv 32 4×4+1, FC 512",
            "F": "Conv 32 4×4+2, Conv 64 4×4+1, FC 512",
            "G": "Conv 8 3×3+2, Conv 16 3×3+1, Conv 32 3×3+1, Conv 64 3×3+1, FC 512",
            "H": "Conv 16 3×3+2, Conv 32 3×3+1, Conv 64 3×3+1, Conv 128 3×3+1, FC 512",
            "I": "Conv 8 3×3+1, Conv 8 4×4+2, Conv 16 3×3+1, Conv 16 4×4+2, FC 512",
            "J": "Conv 16 3×3+1, Conv 16 4×4+2, Conv 32 3×3+1, Conv 32 4×4+2, FC 512",
        }.items()
    },
    "digits-cnn": Architecture(
        "a small network for the 8×8 digits, trained in seconds",
        "Conv 16 3×3+1, Conv 32 4×4+2, FC 64",
    ),
}


def build(
    name: str,
    input_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Build a network with torch's default initialisation.

    Args:
        name: a key of :data:`MODELS`.
        input_shape: ``(C, H, W)`` of one image.
        classes: number of outputs of the last linear layer, at least 2.
        mean: with ``std``, one number per channel for a leading
            :class:`~robust_app.layers.Normalize`; no such layer without them.
        std: see ``mean``.
        batch_norm: whether a :class:`~robust_app.batch_norm.BatchNorm` follows each convolution
            and hidden linear layer, before the ReLU; these layers then have no bias of their own.

    Returns:
        A flat sequence from images ``(batch, C, H, W)`` to logits ``(batch, classes)``.

    Raises:
        UserError: the name is unknown, the image too small for the network or ``classes`` below 2.
        ValueError: ``mean`` and ``std`` do not fit each other or the channels.

    >>> build("digits-cnn", (1, 8, 8), classes=10)[-1]
    Linear(in_features=64, out_features=10, bias=True)
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, got {classes}")
    architecture = MODELS[name]
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    if mean is not None or std is not None:
        if mean is None or std is None or len(mean) != channels:
            raise ValueError(
                f"mean and std must both have {channels} entries, one per channel,"
                f" got mean={mean} and std={std}"
            )
        layers.append(Normalize(mean, std))

    for conv in architecture.convolutions:
        height, width = (_output_size(size, conv) for size in (height, width))
        if min(height, width) < 1:
            raise UserError(
                f"images of {input_shape[1]}×{input_shape[2]} pixels are too small for {name}"
            )
        layers.append(
            Conv2d(channels, conv.channels, conv.kernel, conv.stride, 1, bias=not batch_norm)
        )
        layers += _activation(conv.channels, batch_norm)
        channels = conv.channels

    layers.append(nn.Flatten())
    features = channels * height * width
    for units in architecture.dense:
        layers.append(nn.Linear(features, units, bias=not batch_norm))
        layers += _activation(units, batch_norm)
        features = units
    return nn.Sequential(*layers, nn.Linear(features, classes))


def parameter_count(name: str, input_shape: tuple[int, int, int], classes: int) -> int:
    """The number of weights and biases that :func:`build` would make; none is made.

    Raises:
        UserError: see :func:`build`.

    >>> parameter_count("dm-small", (1, 28, 28), classes=10)
    550406
    """
    with torch.device("meta"):
        network = build(name, input_shape, classes)
    return sum(parameter.numel() for parameter in network.parameters())


def _activation(channels: int, batch_norm: bool) -> list[nn.Module]:
    return [BatchNorm(channels), nn.ReLU()] if batch_norm else [nn.ReLU()]


def _output_size(size: int, conv: Conv) -> int:
    return (size + 2 - conv.kernel) // conv.stride + 1
