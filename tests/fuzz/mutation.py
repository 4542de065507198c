"""Seeded damage: to bytes, to values of plain types, to the members of zip archives."""

import copy
import io
import math
import random
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Random = random.Random

CANARY = "executed"
"""The file that a payload would make."""

PAYLOAD = f"c__builtin__\nopen\n(X{len(CANARY):c}\0\0\0{CANARY}X\1\0\0\0wtR".encode("latin1")
"""Opcodes of a pickle that make the file, and leave it on the stack."""

NUMBERS = (
    *(0, 1, -1, 2, 3, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**9, 10**12, 10**18, 10**40, 16**6000, True, False),
    *(0.0, -0.0, 0.5, 1e-320, 1e30, 1e300, math.inf, -math.inf, math.nan),
)
TEXTS = (
    *("", "a", "\0", "a\nb", "\ud800", "\u202e", "🙂", "x" * 100_000, "../../../etc/passwd"),
    *("/dev/zero", "npz:/dev/zero", "npz:", "digits", "%s%n", "nan", "1e999", "9" * 5000),
)


def nested(depth: int, of_lists: bool = True) -> Any:
    """A list in a list, or a mapping in a mapping, and so on."""
    value: Any = []
    for _ in range(depth):
        value = [value] if of_lists else {"a": value}
    return value


def hostile_value(random: Random) -> Any:
    """Something that is most likely not what is expected."""
    kind = random.randrange(8)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(TEXTS)
    return random.choice(
        (
            *(None, [], {}, [None], {"": None}, [[1, 2], [3]], [0.5, 0.5], [1e39, 1], [True, True]),
            nested(random.choice((3, 60, 150, 400, 900)), random.random() < 0.5),
            [0] * 1000,
            random.uniform(-10, 10),
            random.randrange(-5, 20),
        )
    )


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key or index of it."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        here = todo.pop()
        if isinstance(here, dict):
            found += [(here, key) for key in here]
            todo += here.values()
        elif isinstance(here, list):
            found += [(here, index) for index in range(len(here))]
            todo += here
    return found


def mutate_value(
    value: Any, random: Random, hostile: Callable[[Random], Any] = hostile_value
) -> Any:
    """A copy with one to three changes: values replaced, left out, moved, given other names."""
    root = {"root": copy.deepcopy(value)}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        # The root itself once in a while: it is one place of hundreds otherwise.
        at_root = random.random() < 0.03
        everywhere = places(root)
        container, key = everywhere[0] if at_root else random.choice(everywhere)
        kind = random.randrange(6)
        if kind == 0 and not at_root:
            del container[key]
        elif kind == 1:
            other, place = random.choice(everywhere)
            container[key] = copy.deepcopy(other[place])
        elif kind == 2 and isinstance(container, dict) and not at_root:
            name = random.choice((f"{key}x", "", 0, -1, None, 10**18))
            container[name] = container.pop(key)
        elif kind == 3 and isinstance(container, list):
            container += container[: random.randrange(4)] * random.choice((1, 2, 50))
        else:
            container[key] = hostile(random)
        if "root" not in root or not places(root):
            root = {"root": None}
    return root["root"]


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flips, cuts, repetitions, and numbers at the ends of their ranges."""
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3, 8, 30))):
        if not damaged:
            return bytes(random.randbytes(random.randrange(64)))
        at = random.randrange(len(damaged))
        end = min(len(damaged), at + random.choice((1, 2, 4, 8, 16, 64, 256)))
        kind = random.randrange(9)
        if kind == 0:
            damaged[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            damaged[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif kind == 2:
            del damaged[at : random.choice((end, end, len(damaged)))]
        elif kind == 3:
            damaged[at:at] = damaged[at:end] * random.choice((1, 2, 9))
        elif kind == 4:
            size = random.choice((1, 2, 4, 8))
            number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, len(data), 10**9))
            order = random.choice(("little", "big"))
            damaged[at : at + size] = (number % 256**size).to_bytes(size, order)
        elif kind == 5:
            damaged[at:end] = random.randbytes(end - at)
        elif kind == 6:
            other = random.randrange(len(damaged))
            damaged[other : other + end - at] = damaged[at:end]
        elif kind == 7:
            damaged[at:end] = bytes(end - at)
        else:
            damaged[at:at] = random.choice(TEXTS).encode("utf-8", "surrogatepass")[:64]
    return bytes(damaged)


BOMB = 300
"""MiB of zeros: a third of one when they are deflated."""

Members = Sequence[tuple[str, bytes]]


def members(archive: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a zip archive's members."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def zipped(parts: Members, deflated: bool = False, bombs: Sequence[str] = ()) -> bytes:
    """A zip archive, with the right checksums; some members go on with zeros for very long."""
    target = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", kind) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in parts:
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            with file.open(info, "w", force_zip64=True) as member:
                member.write(content)
                for _ in range(BOMB if name in bombs else 0):
                    member.write(bytes(2**20))
    return target.getvalue()


def mutate_members(
    archive: bytes, random: Random, by_ending: Mapping[str, Callable[[bytes, Random], bytes]]
) -> bytes:
    """An archive that is whole, but whose members were damaged, renamed, left out or blown up.

    Args:
        archive: of the members.
        random: decides.
        by_ending: what damages a member, by the end of its name; bytes are damaged otherwise.
    """
    parts = members(archive)
    deflated, bombs = random.random() < 0.2, list[str]()
    for _ in range(random.choice((1, 1, 2, 3))):
        if not parts:
            break
        at = random.randrange(len(parts))
        name, content = parts[at]
        special = [damage for ending, damage in by_ending.items() if name.endswith(ending)]
        kind = random.randrange(12)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.append((name, mutate_bytes(content, random)))
        elif kind == 2:
            new = random.choice((f"../{name}", f"/{name}", name[1:], f"{name}x", f"a/{name}", ""))
            parts[at] = (new, content)
        elif kind == 3:
            parts[at] = (name, content[: random.randrange(len(content) + 1)])
        elif kind == 4 and random.random() < 0.03:
            bombs.append(name)
        elif kind == 5:
            parts[at] = (name, parts[random.randrange(len(parts))][1])
        elif special:
            parts[at] = (name, special[0](content, random))
        else:
            parts[at] = (name, mutate_bytes(content, random))
    made = zipped(parts, deflated or bool(bombs), bombs)
    return mutate_zip_fields(made, random) if random.random() < 0.2 else made


def mutate_zip_fields(archive: bytes, random: Random) -> bytes:
    """Sizes, offsets and methods in headers set to what they are not."""
    damaged = bytearray(archive)
    places = []
    for signature, length in ((b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)):
        at = damaged.find(signature)
        while at >= 0:
            places.append((at, length))
            at = damaged.find(signature, at + 1)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, length = random.choice(places)
        place = at + random.randrange(4, length, 2)
        number = random.choice((0, 1, 8, 99, 2**16 - 1, 2**31 - 1, 2**32 - 1, len(archive)))
        size = random.choice((2, 4))
        damaged[place : place + size] = (number % 256**size).to_bytes(size, "little")
    return bytes(damaged)


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """A pickle with other numbers, names and opcodes, or with a payload in it."""
    kind = random.randrange(5)
    if kind == 0:
        at = random.choice((2, 2, len(data) - 1, random.randrange(len(data))))
        return data[:at] + PAYLOAD + random.choice((b"", b"0")) + data[at:]
    if kind == 1:
        return data.replace(*random.choice(NAMES), random.choice((1, -1)))
    if kind == 2:  # a number
        damaged = bytearray(data)
        at = random.choice([i for i, byte in enumerate(data) if byte in b"KMJ"] or [0])
        new = random.choice(
            (b"J\0\0\0\x10", b"J\xff\xff\xff\x7f", b"J\0\0\0\x80", b"K\0", b"N", b"\x88", b"}")
        )
        damaged[at : at + {75: 2, 77: 3, 74: 5}.get(data[at], 1)] = new
        return bytes(damaged)
    if kind == 3:
        return data[:-1] + random.choice(SNIPPETS) + random.choice((b".", b"0."))
    return mutate_bytes(data, random)


NAMES = (
    (b"FloatStorage", b"DoubleStorage"),
    (b"FloatStorage", b"BoolStorage"),
    (b"FloatStorage", b"ComplexFloatStorage"),
    (b"FloatStorage", b"QInt8Storage"),
    (b"torch\nFloatStorage", b"torch.storage\nUntypedStorage"),
    (b"_rebuild_tensor_v2", b"_rebuild_qtensor"),
    (b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor"),
    (b"_rebuild_tensor_v2", b"_rebuild_meta_tensor_no_storage"),
    (b"_rebuild_tensor_v2", b"_rebuild_parameter"),
    (b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem"),
    (b"collections\nOrderedDict", b"collections\nCounter"),
    (b"collections\nOrderedDict", b"builtins\nset"),
    (b"X\x03\0\0\0cpu", b"X\x04\0\0\0meta"),
    (b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:9"),
    (b"storage", b"storagf"),
)
SNIPPETS = (
    b"cbuiltins\nbytearray\nJ\0\0\0\x20\x85R",  # 512 MiB, for thirty bytes
    b"ctorch\nTensor\nJ\0\0\0\x40\x85R",  # 4 GiB
    b"ctorch\nSize\nJ\0\0\0\x40\x85R",
    b"ccollections\nCounter\ncbuiltins\nbytearray\nJ\0\0\0\x10\x85R\x85R",
    b"r\xff\xff\xff\xff",  # a memo of four milliards
    b"\x8b\xff\xff\xff\x7f",  # an integer of two gigabytes
    b"X\xff\xff\xff\x7f",
    b"(" * 50_000,
    b"]" + b"]a" * 5 + b"\x85" * 50_000,
)
