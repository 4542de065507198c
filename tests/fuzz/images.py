"""Images: .npz archives, the IDX files of MNIST, the batches of CIFAR-10."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from robust_app import data, examination
from robust_app.data import Dataset
from robust_app.networks import build_network
from robust_app.training import Trainer
from tests.fuzz.formats import Format
from tests.fuzz.mutation import (
    CANARY,
    Random,
    mutate_bytes,
    mutate_members,
    mutate_pickle,
)
from tests.fuzz.tensors import EXAMINATION, damaged
from tests.robust_app.runs import ALONE, full_strength


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (CANARY, "w")


def go_on(dataset: Dataset) -> None:
    """Build a network for the images and its trainer, and evaluate an image."""
    config = full_strength("advibp", batch_size=2, held_out=0, model="digits-cnn")
    Trainer(config, dataset, ALONE)
    built = build_network(config, dataset)
    examination.examine(built.eval(), dataset.x_test[:1], dataset.y_test[:1], EXAMINATION, 0)


def npz() -> Format:
    """A file of the user's own."""
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (8, 6, 6), dtype=np.uint8),
        "y_train": np.arange(8) % 3,
        "x_test": random.random((3, 6, 6)),
        "y_test": np.arange(3, dtype=np.uint8),
    }

    def write(random: Random, folder: Path) -> None:
        content = dict(arrays)
        if random.random() < 0.4:
            for _ in range(random.choice((1, 1, 2))):
                key = random.choice(list(arrays))
                content[key] = _other_array(content[key], random)
        target = io.BytesIO()
        random.choice((np.savez, np.savez_compressed))(target, **content)
        whole = target.getvalue()
        if random.random() < 0.6:
            whole = mutate_members(whole, random, {".npy": _mutate_npy})
        elif random.random() < 0.6:
            whole = mutate_bytes(whole, random)
        (folder / "data.npz").write_bytes(whole)

    return Format(write, lambda folder: go_on(data.load(f"npz:{folder / 'data.npz'}")))


def _other_array(array: Any, random: Random) -> Any:
    """Of another type, shape or content."""
    kind = random.randrange(8)
    if kind == 0:
        names = ("f2", "f4", "f8", "i8", "u8", "i1", "c8", "U3", "S5", "M8[s]", "?", "g", ">f4")
        return array.astype(random.choice(names))
    if kind == 1:
        return np.array([Payload()] * len(array), dtype=object)
    if kind == 2:
        return array[: random.choice((0, 1, 2))]
    if kind == 3:
        return random.choice((array[None], array[..., None], array.T, array.ravel()))
    if kind == 4:
        with np.errstate(all="ignore"):
            return array * random.choice((float("nan"), float("inf"), -1.0, 1e30))
    if kind == 5:
        return np.full_like(array, random.choice((0, 1, 127)))
    if kind == 6:
        return np.zeros(len(array), dtype=[("a", "i4"), ("b", "f8", (2, 2))])
    return np.full(len(array), random.choice((2**63 - 1, 10**9, 2**32, 1000)))


def _mutate_npy(content: bytes, random: Random) -> bytes:
    """A .npy whose header says something else, with as many bytes as before."""
    length = struct.unpack("<H", content[8:10])[0]
    header, rest = content[10 : 10 + length], content[10 + length :]
    kind = random.randrange(6) if b"'descr': '" in header else 5  # not twice
    if kind == 0:
        shapes = (
            *("(100000000000,)", "(10**11,)", "(3, 200000, 200000)", "(-1,)", "(2**40, 0)"),
            *("(18446744073709551616,)", "()", "(8, 6, 6, 1, 1)", "(True,)", "(1.5,)", "None"),
            "(" + "1," * 80 + ")",
        )
        start, end = header.index(b"(", header.index(b"shape")), header.rindex(b")") + 1
        header = header[:start] + random.choice(shapes).encode() + header[end:]
    elif kind == 1:
        start = header.index(b"'descr': '") + 10
        types = (b"|O", b"<U9", b"<f8", b"|V0", b"|S0", b"|S2000000000", b"<M8[s]", b"x", b"<g16")
        header = header[:start] + random.choice(types) + header[header.index(b"'", start) :]
    elif kind == 2:
        header = random.choice((b"__import__('os').system('touch executed')", b"[" * 9000, b"{}"))
    elif kind == 3:
        rest = pickle.dumps(Payload())
        header = header.replace(b"|u1", b"|O").replace(b"<i8", b"|O").replace(b"<f8", b"|O")
    else:
        return mutate_bytes(content[: 10 + length], random) + rest
    header = header.ljust(length)
    return content[:8] + struct.pack("<H", len(header) % 2**16) + header + rest


def idx() -> Format:
    """The four files of MNIST, and what torchvision made of them once."""
    labels, random = bytes(i % 10 for i in range(12)), np.random.default_rng(0)
    pixels = random.integers(0, 256, 12 * 64, dtype=np.uint8).tobytes()
    good = {}
    for part, count in (("train", 8), ("t10k", 4)):
        good[f"{part}-images-idx3-ubyte"] = (
            struct.pack(">IIII", 0x803, count, 8, 8) + pixels[: 64 * count]
        )
        good[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, count) + labels[:count]

    def write(random: Random, folder: Path) -> None:
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        changed = random.sample(list(good), random.choice((1, 1, 2, 4)))
        for name, content in good.items():
            if name in changed:
                content = _mutate_idx(content, random)
            (raw / name).write_bytes(content)
        if random.random() < 0.05:
            processed = folder / "MNIST" / "processed"
            processed.mkdir()
            for name in ("training.pt", "test.pt"):
                content = damaged([random.random(), {"a": 3}], random)
                (processed / name).write_bytes(content)

    return Format(write, lambda folder: go_on(data.load("mnist", folder)))


def _mutate_idx(content: bytes, random: Random) -> bytes:
    kind = random.randrange(4)
    if kind == 0:
        return mutate_bytes(content[:16], random) + content[16:]
    if kind == 1:
        return mutate_bytes(content, random)
    header = bytearray(content)
    at = 4 * random.randrange(4)
    number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**16, 7, 9, 0x802, 0xD03, 0x8FF, 0xE03))
    header[at : at + 4] = struct.pack(">I", number)
    return bytes(header)


def cifar10() -> Format:
    """The pickles of CIFAR-10."""
    batch = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}
    whole = pickle.dumps(batch, protocol=2)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]

    def write(random: Random, folder: Path) -> None:
        batches = folder / "cifar-10-batches-py"
        batches.mkdir()
        changed = random.sample(names, random.choice((1, 1, 7)))
        for name in names:
            content = mutate_pickle(whole, random) if name in changed else whole
            (batches / name).write_bytes(content)

    return Format(write, lambda folder: go_on(data.load("cifar10", folder)))
