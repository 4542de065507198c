"""The tensors of an ONNX file: in it, or in files beside it, and no larger than these are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robust_app.archives import SHARED
from robust_app.errors import UserError, shown
from robust_app.exchange import packages

ENTRIES = {"location", "offset", "length", "checksum"}


def read_model(path: Path) -> Any:
    """An ``onnx.ModelProto`` with its tensors in memory.

    Raises:
        UserError: a package is missing, a tensor lies elsewhere than in the file's own folder, or
            together they are far larger than the files that they are in.
        Exception: onnx raises almost anything of a damaged file.
    """
    onnx = packages.onnx()
    model = onnx.load(path, load_external_data=False)
    outside = onnx.external_data_helper.uses_external_data
    sizes: dict[str, int] = {}
    total = 0
    for tensor in _messages(model):
        if tensor.DESCRIPTOR.name == "TensorProto" and outside(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            sizes[entries.get("location", "")], length = _measured(path, entries)
            total += length
    if total > SHARED * sum(sizes.values()):
        raise UserError(
            f"{path}: has tensors of {total} bytes together, in files of {sum(sizes.values())}"
        )
    onnx.load_external_data_for_model(model, str(path.parent))
    return model


def _measured(path: Path, entries: dict[str, str]) -> tuple[int, int]:
    """The bytes of a tensor's file, and of the tensor in it.

    Raises:
        UserError: its place is no part of an ordinary file beside the model.
    """
    name = entries.get("location", "")
    file = path.parent / name
    # A link would lead to any file, and so do "..", "/" and what is no name at all.
    if Path(name).name != name or file.is_symlink() or not file.is_file():
        raise UserError(f"{path}: expected tensors in files beside it, found {shown(name)}")
    size, numbers = file.stat().st_size, [entries.get("offset", "0"), entries.get("length", "0")]
    fits = all(number.isdecimal() and len(number) < 20 for number in numbers)
    if not fits or sum(map(int, numbers)) > size or entries.keys() - ENTRIES:
        raise UserError(f"{path}: has a tensor that is no part of the {size} bytes of {name}")
    offset, length = map(int, numbers)
    return size, length or size - offset  # without one, all that follows


def _messages(message: Any) -> Iterator[Any]:
    """A message of protobuf and all within it; protobuf itself bounds how deep they are nested."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            several = hasattr(value, "__len__")
            for inner in value if several else (value,):
                yield from _messages(inner)
