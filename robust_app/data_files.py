"""Files of images and labels as arrays: ``.npz``, IDX, and what torchvision unpickles."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robust_app import archives
from robust_app.errors import UserError, reason

KEYS = ("x_train", "y_train", "x_test", "y_test")

Arrays = Mapping[str, NDArray[Any]]
"""Of those names."""


class Source(NamedTuple):
    """Where torchvision keeps a data set below its root, and the name of its class there."""

    class_name: str
    folder: str
    files: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


_IDX = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
SOURCES = {
    "mnist": Source("MNIST", "MNIST/raw", _IDX),
    "fashion-mnist": Source("FashionMNIST", "FashionMNIST/raw", _IDX),
    "cifar10": Source(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
}


def read_npz(path: Path) -> Arrays:
    """The four arrays of an ``.npz`` file.

    Raises:
        UserError: it cannot be read, or lacks one.
    """
    try:
        arrays, found = archives.read_arrays(path.expanduser(), KEYS)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError of a home that is not there
        raise UserError(f"{path}: cannot be read as an .npz file ({reason(error)})") from error
    if len(arrays) < len(KEYS):
        raise UserError(
            f"{path}: expected the arrays {', '.join(KEYS)}, found {', '.join(found) or 'none'}"
        )
    return arrays


def read_torchvision(name: str, source: Source, root: Path, download: bool) -> Arrays:
    """The four arrays of files laid out as torchvision does.

    Args:
        name: of the data set.
        source: where they lie.
        root: the folder that holds them.
        download: fetch them where they are missing.

    Raises:
        UserError: they are missing or damaged, or cannot be fetched.
    """
    from torchvision import datasets

    folder = root / source.folder
    missing = [file for file in source.files if not (folder / file).is_file()]
    if missing and not download:
        raise UserError(
            f"dataset {name}: {', '.join(missing)} not found in {folder}; "
            "give another --data-root, or --download to fetch the files"
        )
    maker = getattr(datasets, source.class_name)
    try:
        if source.files == _IDX:
            if missing:
                maker(root, download=True)
            return _read_idx(folder)
        # It unpickles files of the right checksums alone.
        parts = {
            part: maker(root, train=train, download=download)
            for part, train in (("train", True), ("test", False))
        }
    except Exception as error:  # a damaged file may raise almost anything
        problem = (
            f"cannot be downloaded to {folder} ({reason(error)})"
            if missing
            else f"the files in {folder} are damaged ({reason(error)}); "
            "delete them and use --download to fetch them again"
        )
        raise UserError(f"dataset {name}: {problem}") from error
    images = {f"x_{part}": np.asarray(data.data) for part, data in parts.items()}
    labels = {f"y_{part}": np.asarray(data.targets) for part, data in parts.items()}
    return images | labels


def _read_idx(folder: Path) -> Arrays:
    """The four files of :data:`_IDX`.

    Raises:
        OSError: one cannot be read.
        ValueError: one is not as long as its header says.
    """
    arrays = (_idx(folder / file, 3 if "images" in file else 1) for file in _IDX)
    return dict(zip(KEYS, arrays, strict=True))


def _idx(path: Path, dimensions: int) -> NDArray[Any]:
    """Bytes of a shape that a header of big-endian numbers says."""
    with path.open("rb") as file:
        magic, *shape = np.frombuffer(file.read(4 * (1 + dimensions)), ">u4").tolist()
        size = file.seek(0, io.SEEK_END) - 4 * (1 + dimensions)
        expected = 0x800 + dimensions  # 8 is of bytes
        if magic != expected or len(shape) != dimensions or math.prod(shape) != size:
            raise ValueError(
                f"{path.name}: expected the number {expected} and {dimensions} sizes, of as many "
                f"bytes as follow, found {magic}, {shape} and {size} bytes"
            )
        file.seek(-size, io.SEEK_END)
        return np.frombuffer(bytearray(file.read()), np.uint8).reshape(shape)
