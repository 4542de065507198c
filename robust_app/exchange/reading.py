"""An ONNX model as a chain of layers that attacks and bounds know."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_app.errors import UserError, one_line, shown
from robust_app.exchange import packages
from robust_app.exchange.operators import LAYERS, Node
from robust_app.layers import ElementwiseAffine

NUMBERS = 2**24
"""That a layer may make of an image, or all operators of constants together."""

OPERATORS = 1000
"""Of a model, at most: a small file may hold thousands, which take seconds to read and verify."""

Constants = dict[str, Any]
"""Arrays by name."""


def from_onnx(model: Any, image_shape: tuple[int, ...]) -> nn.Sequential:
    """The layers of an ``onnx.ModelProto``, in float32 and evaluation mode.

    Args:
        model: a chain of operators of :data:`~robust_app.exchange.operators.LAYERS`, each on the
            output of the one before; what depends on constants and shapes alone is computed now.
        image_shape: of the images that it is to take, ``(C, H, W)``. The model's own input may
            be flat, or have more or fewer dimensions of 1.

    Raises:
        UserError: the model is no such chain, too long a one, or for images of another shape.
    """
    graph = model.graph
    if len(graph.node) > OPERATORS:
        raise UserError(f"expected at most {OPERATORS} operators, found {len(graph.node)}")
    constants = {value.name: _initializer(value) for value in graph.initializer}
    last, shape = _input(graph, constants)
    layers = _to_shape(image_shape, shape)
    left = NUMBERS
    for proto in graph.node:
        known = constants
        if proto.op_type == "Shape":  # of a batch of one: what reshapes leaves the batch open
            known = constants | {last: torch.empty(1, *shape).numpy()}
        with _refusing(proto):
            if known.keys() >= set(filter(None, proto.input)):
                made = _computed(model, proto, known, left)
                left -= sum(map(np.size, made.values()))
                constants |= made
                continue
            node = _node(proto, last, shape, constants)
            node.check(node.operator in LAYERS, "no layer here computes it")
            layer, shape = _layer(node)
            _append(layers, layer)
        last = proto.output[0]
    outputs = [value.name for value in graph.output]
    if outputs != [last]:
        raise UserError(f"expected one output, of the last operator, found {', '.join(outputs)}")
    return nn.Sequential(*layers).eval()


def _input(graph: Any, constants: Constants) -> tuple[str, tuple[int, ...]]:
    """The name of the image, and its shape without the batch dimension."""
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise UserError(f"expected one input, found {len(inputs)}")
    dimensions = inputs[0].type.tensor_type.shape.dim
    shape = tuple(dimension.dim_value for dimension in dimensions[1:])
    if not shape or min(shape) < 1:  # 0 stands for a size that is left open
        found = tuple(dimension.dim_param or dimension.dim_value for dimension in dimensions)
        raise UserError(f"expected an input of batch and image of known size, found {shown(found)}")
    return inputs[0].name, shape


def _to_shape(image_shape: tuple[int, ...], shape: tuple[int, ...]) -> list[nn.Module]:
    """Layers that give images the shape of the model's input."""
    if shape == image_shape:
        return []
    sizes = [size for size in shape if size > 1]
    pixels = torch.Size(image_shape).numel()
    # Else the order of the dimensions may be another.
    if sizes not in ([size for size in image_shape if size > 1], [pixels]):
        raise UserError(f"takes images of shape {shape}, those of the data set have {image_shape}")
    return [nn.Flatten(), nn.Unflatten(1, shape)] if len(shape) > 1 else [nn.Flatten()]


@contextmanager
def _refusing(proto: Any) -> Iterator[None]:
    """Say of which node and operator it is what makes a model no chain of layers."""
    try:
        yield
    except Exception as error:  # torch and the reference evaluator raise almost anything
        known = isinstance(error, UserError)
        why = str(error) if known else f"cannot be computed ({one_line(error)})"
        raise UserError(
            f"node {proto.name or proto.output[0]}, operator {_operator(proto)}: {why}"
        ) from error


def _operator(proto: Any) -> str:
    return f"{proto.domain}.{proto.op_type}" if proto.domain else str(proto.op_type)


def _computed(model: Any, proto: Any, constants: Constants, most: int) -> Constants:
    """The outputs of an operator on constants, of at most so many numbers."""
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    _check_computable(proto, constants, model.opset_import, most)
    evaluator = packages.onnx().reference.ReferenceEvaluator(proto, opsets=opsets)
    with np.errstate(all="ignore"):  # what comes of it is looked at by whoever uses it
        outputs = evaluator.run(None, {name: constants[name] for name in proto.input if name})
    return dict(zip(proto.output, outputs, strict=True))


def _check_computable(proto: Any, constants: Constants, opsets: Any, most: int) -> None:
    """Refuse an operator whose outputs may be of more numbers, before any is computed.

    Raises:
        UserError: they may.
    """
    onnx = packages.onnx()
    make, of_array = onnx.helper, onnx.numpy_helper.from_array
    if any(attribute.HasField("g") or attribute.graphs for attribute in proto.attribute):
        raise UserError("it contains a graph")
    names = dict.fromkeys(filter(None, proto.input))
    values = [of_array(np.asarray(constants[name]), name) for name in names]
    outputs = [make.make_empty_tensor_value_info(name) for name in proto.output if name]
    alone = make.make_graph([proto], "alone", [], outputs, values)
    # Which does not compute: it knows how sizes follow from sizes, and from constants.
    known = onnx.shape_inference.infer_shapes(make.make_model(alone, opset_imports=opsets))
    for output in known.graph.output:
        tensor = output.type.tensor_type
        sizes = [dimension.dim_value for dimension in tensor.shape.dim]
        sized = tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)
        if not sized:
            raise UserError("the sizes of its constants do not tell those of what it makes")
        most -= math.prod(sizes)
        if most < 0:
            raise UserError(
                f"expected at most {NUMBERS} numbers computed of constants, those before it "
                f"included, found sizes {shown(sizes)}"
            )


def _initializer(value: Any) -> Any:
    """A constant of the file, as large as its bytes are."""
    try:
        return packages.onnx().numpy_helper.to_array(value)
    except Exception as error:  # of sizes and types that do not fit, numpy raises many kinds
        raise UserError(f"constant {shown(value.name)}: {one_line(error)}") from error


def _node(proto: Any, last: str, shape: tuple[int, ...], constants: Constants) -> Node:
    places = [i for i, name in enumerate(proto.input) if name and name not in constants]
    if [proto.input[place] for place in places] != [last]:
        raise UserError(
            "expected a chain, each operator on the output of the one before and on constants, "
            f"found the inputs {', '.join(proto.input)}"
        )
    value = packages.onnx().helper.get_attribute_value
    return Node(
        _operator(proto),
        tuple(_tensor(constants[name]) if name in constants else None for name in proto.input),
        places[0],
        shape,
        {attribute.name: value(attribute) for attribute in proto.attribute},
    )


def _tensor(array: Any) -> Tensor:
    tensor = torch.tensor(array)
    return tensor.float() if tensor.is_floating_point() else tensor


def _layer(node: Node) -> tuple[nn.Module, tuple[int, ...]]:
    """What the operator is here, and the shape of its output."""
    try:
        with torch.no_grad():
            layer = LAYERS[node.operator](node).eval()
            shape = _output_shape(layer, node.shape)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"does not fit its input of shape {node.shape} ({one_line(error)})"
        ) from error
    node.check(0 < math.prod(shape) <= NUMBERS, f"its output has the shape {shape}")
    return layer, shape


def _output_shape(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's output without the batch dimension; nothing is computed."""
    state = {name: value.to("meta") for name, value in layer.state_dict().items()}
    x = torch.empty(1, *shape, device="meta")
    output: Tensor = torch.func.functional_call(layer, state, (x,))
    return tuple(output.shape[1:])


def _append(layers: list[nn.Module], layer: nn.Module) -> None:
    """Add a layer; what scales and shifts the outputs of a Linear becomes one with it.

    The last Linear with its bias is what margins are merged with.
    """
    before = layers[-1] if layers else None
    if (
        isinstance(before, nn.Linear)
        and isinstance(layer, ElementwiseAffine)
        and layer.scale.ndim == 1
    ):
        shift = layer.shift if before.bias is None else layer(before.bias)
        before.weight = nn.Parameter(layer.scale.unsqueeze(1) * before.weight)
        before.bias = nn.Parameter(shift.detach())
    else:
        layers.append(layer)
