"""Data sets as tensors on the device: images stay uint8, batches are index tensors.

There are no loader processes: even CIFAR-10 is 180 MB, and indexing on the device is faster than
any worker that would feed it.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_app.data_files import KEYS, SOURCES, Arrays, read_npz, read_torchvision
from robust_app.errors import SettingError, UserError, one_line, shown, unknown

CLASSES = 1000
"""The most that a data set may have: bounds take memory by their square."""

DATASETS = {
    "digits": "UCI handwritten digits, 1,437 + 360 images of 1x8x8, in the package",
    "mnist": "MNIST handwritten digits, 60,000 + 10,000 images of 1x28x28",
    "fashion-mnist": "Fashion-MNIST articles of clothing, 60,000 + 10,000 images of 1x28x28",
    "cifar10": "CIFAR-10 photographs, 50,000 + 10,000 images of 3x32x32",
    "npz:PATH": f"a file of your own with the arrays {', '.join(KEYS)}",
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, all on one device.

    Args:
        name: as given to :func:`load`.
        x_train, x_test: images (n, C, H, W), uint8 or float32 in [0, 1].
        y_train, y_test: labels (n,), int64 in [0, classes).
        classes: the number of classes.
        mean, std: per channel (C,) in units of [0, 1], for a network's normalisation layer; None
            where the pixels are used as they are.

    >>> load("digits").checksum[:15]
    'sha256:633e8e48'
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device."""
        return dataclasses.replace(self, **{key: getattr(self, key).to(device) for key in KEYS})

    @cached_property
    def checksum(self) -> str:
        """Of all images and labels, the same on every device: tells data from others."""
        digest = hashlib.sha256()
        for key in KEYS:
            tensor = getattr(self, key).contiguous().cpu()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().data)
        return f"sha256:{digest.hexdigest()}"


def load(name: str, data_root: Path | None = None, download: bool = False) -> Dataset:
    """Load a data set of :data:`DATASETS` into memory, on the CPU.

    ``npz:PATH`` reads ``x_train``, ``y_train``, ``x_test`` and ``y_test``: images of shape
    (n, H, W), (n, C, H, W) or (n, H, W, C) with C in {1, 3}, as uint8 or as floats in [0, 1], and
    labels (n,), non-negative integers. A shape that fits the last two is read as (n, C, H, W). The
    number of classes is the largest label plus one, at most :data:`CLASSES`.

    Args:
        name: a key of :data:`DATASETS`, ``npz:`` followed by a path.
        data_root: folder that holds (or is to hold) the files of mnist, fashion-mnist and cifar10,
            laid out as torchvision does; or the same data as ``NAME.npz``, with arrays as above.
        download: fetch the files of those three where they are missing.

    Raises:
        UserError: the name is unknown, files are missing or damaged, or their content is not images
            and labels as described.

    >>> load("digits").image_shape
    (1, 8, 8)
    """
    if name.startswith("npz:"):
        return _assemble(name, read_npz(Path(name.removeprefix("npz:"))))
    if name == "digits":
        with resources.as_file(resources.files("robust_app") / "digits.npz") as path:
            return _assemble(name, read_npz(path))
    if name not in SOURCES:
        if name.lower().endswith(".npz"):
            own = shown(f"npz:{name}")
            raise UserError(f"dataset {shown(name)}: a file of your own is {own}")
        raise unknown("dataset", name, DATASETS)
    if data_root is None:
        raise UserError(f"dataset {name} needs --data-root, the folder its files lie in")
    source, packed = SOURCES[name], data_root / f"{name}.npz"
    try:
        is_packed = packed.is_file()
    except OSError as error:  # of a name that is too long, or a folder that may not be read
        raise UserError(f"dataset {name}: {shown(str(data_root))}: {one_line(error)}") from error
    read = read_npz(packed) if is_packed else read_torchvision(name, source, data_root, download)
    return _assemble(name, read, source.mean, source.std)


def _assemble(
    name: str,
    arrays: Arrays,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """Check the four arrays and make a Dataset of them."""
    tensors = {}
    for part in ("train", "test"):
        x, y = f"x_{part}", f"y_{part}"
        tensors[x] = _images(f"dataset {name}: {x}", arrays[x])
        tensors[y] = _labels(f"dataset {name}: {y}", arrays[y])
        if len(tensors[x]) != len(tensors[y]):
            raise UserError(
                f"dataset {name}: expected as many labels as images, "
                f"found {len(tensors[y])} in {y} and {len(tensors[x])} in {x}"
            )
    train, test = (tuple(tensors[key].shape[1:]) for key in ("x_train", "x_test"))
    if train != test:
        raise UserError(
            f"dataset {name}: expected training and test images of one shape (C, H, W), "
            f"found {train} and {test}"
        )
    classes = 1 + max(int(tensors[key].max()) for key in ("y_train", "y_test"))
    if classes > CLASSES:
        raise UserError(
            f"dataset {name}: expected labels below {CLASSES}, found {classes - 1}: the largest "
            "label plus one is the number of classes"
        )
    return Dataset(name=name, classes=classes, mean=mean, std=std, **tensors)


def check_trainable(dataset: Dataset) -> None:
    """See that the training part is not what a slip makes of one.

    Raises:
        UserError: its uint8 images are all but black, or it has none of some class.
    """
    if dataset.x_train.dtype is torch.uint8 and dataset.x_train.max() <= 1:
        raise UserError(
            f"dataset {dataset.name}: x_train: expected uint8 from 0 to 255, found none above "
            f"{dataset.x_train.max()}; give images in [0, 1] as floats"
        )
    missing = sorted(set(range(dataset.classes)) - set(dataset.y_train.tolist()))
    if missing:
        raise UserError(
            f"dataset {dataset.name}: expected training images of each class from 0 to "
            f"{dataset.classes - 1}, the largest label, found none of {shown(missing)[1:-1]}"
        )


def _images(where: str, x: NDArray[Any]) -> Tensor:
    """Images as a tensor (n, C, H, W), uint8 or float32."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(
            f"{where}: expected shape (n, H, W), (n, C, H, W) or (n, H, W, C) with C 1 or 3, "
            f"found {x.shape}"
        )
    if x.size == 0:
        raise UserError(f"{where}: expected at least one image, found shape {x.shape}")
    if x.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(x))
    if not np.issubdtype(x.dtype, np.floating):
        raise UserError(f"{where}: expected uint8 or floats in [0, 1], found {x.dtype}")
    outside = ~((x >= 0) & (x <= 1))  # NaN is outside too
    if outside.any():
        first = tuple(int(i) for i in np.argwhere(outside)[0])
        raise UserError(
            f"{where}: expected floats in [0, 1], found {outside.sum()} others, "
            f"the first {x[first]} in image {first[0]}"
        )
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _labels(where: str, y: NDArray[Any]) -> Tensor:
    """Labels as a tensor (n,), int64."""
    if y.ndim != 1:
        raise UserError(f"{where}: expected shape (n,), found {y.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{where}: expected integers, found {y.dtype}")
    y = y.astype(np.int64)
    if (y < 0).any():
        first = int(np.argmax(y < 0))
        raise UserError(
            f"{where}: expected labels of at least 0, found {(y < 0).sum()} below, "
            f"the first {y[first]} at {first}"
        )
    return torch.from_numpy(y)


def split(dataset: Dataset, held_out: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Set ``held_out`` of the training examples aside, drawn at random by ``seed`` alone.

    Returns:
        ``(train_x, train_y, valid_x, valid_y)``; the last two are empty where nothing is held out.

    Raises:
        SettingError: ``held_out`` is negative or leaves no example to train on.

    >>> [len(part) for part in split(load("digits"), held_out=144, seed=0)]
    [1293, 1293, 144, 144]
    """
    count = len(dataset.x_train)
    if not 0 <= held_out < count:
        raise SettingError(
            "held_out", f"expected 0 to {count - 1} of {count} training examples, found {held_out}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    x, y = dataset.x_train, dataset.y_train
    valid, train = order[:held_out].to(x.device), order[held_out:].to(x.device)
    return x[train], y[train], x[valid], y[valid]
