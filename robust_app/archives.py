"""Tensors and arrays in files from anyone.

Nothing in a file is executed, and reading it takes memory in proportion to its size, whatever it
says of its content.
"""

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_app.errors import one_line

ZIP = b"PK\3\4"

SMALL, RATIO = 2**26, 50
"""What an archive may unpack to: so many bytes, or so many times its own size if that is more."""

SHARED = 10
"""How many times its own size the tensors of a file may have together: some share their numbers."""

LEGACY_PICKLES = 5
"""That begin a file as torch wrote them before version 1.6: the fourth is the content."""

NAMES = re.compile(
    r"collections (OrderedDict|Counter)|torch (Size|device|[A-Z]\w*Storage|[a-z]+\d\w*|bool)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)
"""What a pickle may name. torch admits more: its ``bytearray`` makes gigabytes of a few bytes."""


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote of tensors and plain values, on the CPU.

    Every tensor in it has its numbers in memory: none is sparse, or a number repeated.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, is damaged, or holds something else.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        source: IO[bytes] = file
        if file.read(len(ZIP)) == ZIP:  # as torch tells
            _check_zipped(file, size)
        else:
            file.seek(0)
            source = io.BytesIO(file.read())  # what it says of sizes cannot go beyond its end
            _check_pickles(source, LEGACY_PICKLES)
        source.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of foreign pickles, which are refused anyway
                content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its unpickler stumbled over
            raise ValueError(one_line(error)) from error
    _check_tensors(content, size)
    return content


def read_arrays(path: Path, keys: tuple[str, ...]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Arrays of an ``.npz`` archive, those of ``keys`` that it has, and the names of all.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such archive, is damaged, or an array is one of Python objects.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if not zipfile.is_zipfile(file):
            raise ValueError("not a zip archive, or cut short")
        with _opened(file) as archive:
            most = max(SMALL, RATIO * size)
            _check_sizes(archive.infolist(), most, "; numpy.savez leaves it uncompressed")
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            return {key: _array(archive, f"{key}.npy") for key in keys if key in names}, names


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array, which is as large as it says."""
    try:
        with warnings.catch_warnings(), archive.open(name) as member:
            warnings.simplefilter("ignore")  # of arrays that old versions wrote
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of its header")
            read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            header = _Header(*read(member))
            given = archive.getinfo(name).file_size - member.tell()
            needed = int(np.prod([*header.shape, header.dtype.itemsize], dtype=object))
            if header.dtype.hasobject:
                raise ValueError("an array of Python objects, which could execute anything")
            if min(header.shape, default=0) < 0 or needed != given:
                raise ValueError(
                    f"expected {needed} bytes of shape {header.shape} and type {header.dtype}, "
                    f"found {given}"
                )
            content = np.frombuffer(bytearray(member.read()), header.dtype)
            return content.reshape(header.shape, order="F" if header.fortran else "C")
    except Exception as error:  # damaged, they raise almost anything
        raise ValueError(f"{name}: {one_line(error)}") from error


def _opened(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # a damaged archive may raise almost anything
        raise ValueError(f"not a zip archive ({one_line(error)})") from error


def _check_sizes(members: list[zipfile.ZipInfo], most: int, remedy: str = "") -> None:
    """Refuse an archive that would unpack to more than so many bytes."""
    total = sum(member.file_size for member in members)
    if total > most:
        raise ValueError(f"it would unpack to {total} bytes, more than {most}{remedy}")


def _check_zipped(file: IO[bytes], size: int) -> None:
    """Refuse an archive of torch's that is compressed, which it never is, or names too much."""
    with _opened(file) as archive:
        _check_sizes(archive.infolist(), size)
        # torch finds its members by names without regard to their case.
        names = [name.lower() for name in archive.namelist()]
        if len(set(names)) < len(names):
            raise ValueError("two members of one name")
        for name in archive.namelist():
            content = _content(archive, name)  # raises of a wrong checksum, which torch ignores
            if name.lower().endswith("data.pkl"):
                _check_pickles(io.BytesIO(content), 1)


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except Exception as error:  # damaged, they raise almost anything
        raise ValueError(f"{name}: {one_line(error)}") from error


def _check_pickles(source: IO[bytes], count: int) -> None:
    """Refuse pickles that name what tensors and plain values do not need.

    Their opcodes are read one after another, as whoever loads them does; nothing is executed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are none
            for _ in range(count):
                for opcode, argument, _place in pickletools.genops(source):
                    if opcode.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
                        raise ValueError(f"holds {str(argument).replace(' ', '.')[:80]!r}")
                    if opcode.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                        raise ValueError("holds an object")
    except Exception as error:  # it may be no pickle at all
        raise ValueError(one_line(error)) from error


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors that claim more numbers than the file holds."""
    total = 0
    for tensor in _tensors(content):
        claimed = tensor.numel() * tensor.element_size()
        if claimed > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} repeats its numbers")
        total += claimed
    if total > SHARED * size:
        raise ValueError(f"its tensors have {total} bytes together")


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in containers, without recursion; the same one once.

    Raises:
        ValueError: a container has attributes, which may hide its methods.
    """
    todo, seen = [content], {id(content)}
    while todo:
        value, inner = todo.pop(), []
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            if getattr(value, "__dict__", {}).keys() - {"_metadata"}:  # modules' versions
                raise ValueError(f"{type(value).__name__} with attributes")
            inner = list(value.values())
        elif isinstance(value, list | tuple):
            inner = list(value)
        new = [part for part in inner if id(part) not in seen]
        seen.update(map(id, new))
        todo += new
