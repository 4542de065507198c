"""ONNX: networks from elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from robust_app import examination, models
from robust_app.exchange import outside
from robust_app.exchange.writing import to_onnx
from tests.fuzz.formats import Format
from tests.fuzz.mutation import NUMBERS, TEXTS, Random, mutate_bytes
from tests.fuzz.tensors import DIGITS, EXAMINATION

OPERATORS = (
    *("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "EyeLike", "OneHot", "RandomNormal"),
    *("Identity", "Relu", "Sigmoid", "MatMul", "Gemm", "Conv", "MaxPool", "AveragePool", "Mul"),
    *("Add", "Div", "Reshape", "Flatten", "Shape", "Gather", "Concat", "Transpose", "Loop", "If"),
    *("BatchNormalization", "Dropout", "GlobalAveragePool", "Einsum", "Resize", "Upsample", "No"),
)
SIZES = (0, 1, -1, 2, 3, 64, 1000, 10**5, 10**9, 2**31, 2**62, -(2**63))


def graph() -> Format:
    """A network of an .onnx file, with parts beside it or inside."""
    torch.manual_seed(0)
    written = [_by_hand(), _computing(), to_onnx(_small(), (1, 8, 8))]

    def write(random: Random, folder: Path) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(random.choice(written))
        kind = random.random()
        if kind < 0.7:
            for _ in range(random.choice((1, 1, 2, 3))):
                random.choice((_field, _field, _field, _node, _tensor))(model, random)
        content = model.SerializeToString()
        if kind >= 0.7:
            head = random.choice((600, len(content)))
            content = mutate_bytes(content[-head:], random) if kind > 0.85 else content
            content = mutate_bytes(content[:head], random) + content[head:]
        (folder / "net.onnx").write_bytes(content)
        (folder / "net.data").write_bytes(bytes(1024))
        (folder / "link").symlink_to("/etc/hostname")

    def read(folder: Path) -> None:
        network = outside.from_file(folder / "net.onnx", DIGITS)
        examination.examine(network, DIGITS.x_test[:1], DIGITS.y_test[:1], EXAMINATION, 0)

    return Format(write, read)


def _small() -> torch.nn.Sequential:
    return models.build("table-f-a", (1, 8, 8), 10).eval()


def _by_hand() -> Any:
    """With an operator of each kind."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((4, 1, 3, 3)),
        "b": random.standard_normal(4),
        "s": np.abs(random.standard_normal((4, 1, 1))),
        "m": random.standard_normal((4, 10)),
        "v": random.standard_normal((36, 16)),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["X", "w", "b"], ["1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["1", "b", "b", "b", "p"], ["2"]),
        node("Relu", ["2"], ["3"]),
        node("Mul", ["3", "s"], ["4"]),
        node("MaxPool", ["4"], ["5"], kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", ["5"], ["6"], kernel_shape=[2, 2], strides=[1, 1]),
        node("Flatten", ["6"], ["7"]),
        node("MatMul", ["7", "v"], ["8"]),
        node("LeakyRelu", ["8"], ["9"], alpha=0.1),
        node("Reshape", ["9", "shape"], ["10"]),
        node("GlobalAveragePool", ["10"], ["11"]),
        node("Flatten", ["11"], ["12"]),
        node("Gemm", ["12", "m"], ["Y"], alpha=0.5),
    ]
    constants["p"] = np.ones(4)
    return _model(nodes, constants, {"shape": np.array([-1, 4, 2, 2])})


def _computing() -> Any:
    """With shapes and constants that are computed."""
    node = helper.make_node
    filled = numpy_helper.from_array(np.array([0.5], np.float32))
    nodes = [
        node("Shape", ["X"], ["1"]),
        node("Gather", ["1", "zero"], ["2"]),
        node("Concat", ["2", "rest"], ["3"], axis=0),
        node("Reshape", ["X", "3"], ["4"]),
        node("ConstantOfShape", ["size"], ["5"], value=filled),
        node("Expand", ["one", "size"], ["6"]),
        node("Add", ["5", "6"], ["7"]),
        node("Tile", ["7", "ones"], ["8"]),
        node("MatMul", ["4", "8"], ["Y"]),
    ]
    integers = {"zero": [0], "rest": [-1], "size": [64, 10], "ones": [1, 1]}
    return _model(nodes, {"one": np.ones(1)}, {k: np.array(v) for k, v in integers.items()})


def _model(nodes: list[Any], floats: dict[str, Any], integers: dict[str, Any]) -> Any:
    arrays = {name: value.astype(np.float32) for name, value in floats.items()} | integers
    made = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def _messages(message: Any) -> list[Any]:
    """A message of protobuf and all within it."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                found += _messages(inner)
    return found


def _field(model: Any, random: Random) -> None:
    """Another value for a field, whether it is set or not."""
    message = random.choice(_messages(model))
    known = list(message.DESCRIPTOR.fields)
    given = [field for field, _ in message.ListFields()]
    field = random.choice(given or known if random.random() < 0.7 else known)
    if field.message_type is not None:
        parts = getattr(message, field.name)
        if not field.is_repeated:
            message.ClearField(field.name)
        elif len(parts) and random.random() < 0.5:
            del parts[random.randrange(len(parts))]
        elif len(parts):
            parts.append(random.choice(list(parts)))
        return
    value = _value(field, random)
    if not field.is_repeated:
        setattr(message, field.name, value)
        return
    parts = getattr(message, field.name)
    if len(parts) and random.random() < 0.7:
        parts[random.randrange(len(parts))] = value
    else:
        parts.extend([value] * random.choice((1, 1, 2, 50)))


def _value(field: Any, random: Random) -> Any:
    kinds = field.cpp_type
    if kinds == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return random.randbytes(random.choice((0, 1, 4, 40, 4000)))
        texts = [text for text in TEXTS if text.isascii()]
        return random.choice((*texts, *OPERATORS, "X", "Y", "1", "4", "w", "size"))
    if kinds in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return random.choice([n for n in NUMBERS if isinstance(n, float) and not 1e39 < n < 1e301])
    if kinds == field.CPPTYPE_ENUM:
        return random.choice(list(field.enum_type.values_by_number))
    if kinds == field.CPPTYPE_INT64:
        return random.choice(SIZES)
    if kinds == field.CPPTYPE_UINT64:
        return random.choice([abs(size) for size in SIZES])
    return random.choice((0, 1, 2, 5, 7, 11, 2**31 - 1, -1 if kinds == field.CPPTYPE_INT32 else 3))


def _node(model: Any, random: Random) -> None:
    """A node more, another operator, or a chain or a nest of thousands of nodes."""
    nodes, kind = model.graph.node, random.randrange(6)
    if kind == 0 and nodes:
        random.choice(list(nodes)).op_type = random.choice(OPERATORS)
    elif kind == 1 and nodes:
        node = random.choice(list(nodes))
        name = random.choice(("pads", "strides", "kernel_shape", "dilations", "group", "axis"))
        sizes = [random.choice(SIZES) for _ in range(random.choice((2, 4)))]
        node.attribute.append(
            helper.make_attribute(name, sizes[0] if name in ("group", "axis") else sizes)
        )
    elif kind == 2 and nodes:
        last = nodes[-1]
        names = [f"r{i}" for i in range(random.choice((1, 500, 3000)))]
        chain = zip([last.output[0] if last.output else "X", *names], names, strict=False)
        nodes.extend(helper.make_node("Relu", [before], [after]) for before, after in chain)
        if model.graph.output:
            model.graph.output[0].name = names[-1]
    elif kind == 3:
        inner = helper.make_graph([], "in", [], [])
        for _ in range(random.choice((1, 5, 20))):
            inner = helper.make_graph(
                [helper.make_node("If", ["c"], ["d"], then_branch=inner)], "", [], []
            )
        nodes.append(helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    else:
        shape = [random.choice(SIZES) for _ in range(random.choice((1, 2, 4)))]
        value = numpy_helper.from_array(np.array(shape, np.int64), "huge")
        model.graph.initializer.append(value)
        operator = random.choice(OPERATORS[:7])
        inputs = ["huge"] if operator == "ConstantOfShape" else [random.choice(("X", "huge", "m"))]
        inputs += ["huge"] * random.choice((0, 1, 2))
        nodes.insert(0, helper.make_node(operator, inputs, [random.choice(("c", "X2"))]))


def _tensor(model: Any, random: Random) -> None:
    """Sizes that its bytes are not of, or bytes in another file."""
    tensors = [m for m in _messages(model) if m.DESCRIPTOR.name == "TensorProto"]
    if not tensors:
        return
    tensor, kind = random.choice(tensors), random.randrange(4)
    if kind == 0 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(SIZES)
    elif kind == 1:
        tensor.dims.extend([random.choice(SIZES)] * random.choice((1, 2, 60)))
    elif kind == 2:
        tensor.data_type = random.randrange(25)
    else:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        places = (
            "net.data",
            "net.data",
            "../../etc/hostname",
            "/etc/hostname",
            "link",
            "",
            ".",
            "x",
        )
        entries = {"location": random.choice(places)}
        if random.random() < 0.5:
            entries["length"] = str(random.choice((*SIZES, 16)))
        if random.random() < 0.5:
            entries["offset"] = str(random.choice((*SIZES, 16)))
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
