"""A chain of layers as an ONNX model of plain operators.

By a rule for each layer, not by torch's exporter: this needs onnx alone, and gives the operators
that every verifier reads (Flatten, say, and no Reshape to a computed shape).
"""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from robust_app.exchange import packages
from robust_app.folding import fold
from robust_app.layer_rules import Rules, flattened
from robust_app.layers import Normalize

INPUT, OUTPUT = "X", "Y"
OPSET, IR_VERSION = 13, 7  # of 2020: nothing newer is needed, and older verifiers read them


class Graph:
    """Operators in a row and their constants."""

    def __init__(self) -> None:
        self._onnx = packages.onnx()
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Tensor) -> str:
        """Add a constant; returns its name."""
        name = f"constant_{len(self.constants)}"
        array = value.detach().cpu().numpy()
        self.constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, operator: str, *constants: Tensor | None, **attributes: Any) -> None:
        """Add an operator on the output of the one before, followed by its constants."""
        last = self.nodes[-1].output[0] if self.nodes else INPUT
        inputs = [last, *(self.constant(value) for value in constants if value is not None)]
        output = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(operator, inputs, [output], **attributes))


def to_onnx(network: nn.Sequential, image_shape: tuple[int, ...]) -> Any:
    """The network as an ``onnx.ModelProto``, from ``X (batch, *image_shape)`` to logits ``Y``.

    Args:
        network: layers in a row, in evaluation mode, each with a rule of :func:`add_layer`;
            BatchNorm is folded into the layers before it, and numbers are written as float32.
        image_shape: of one image; the batch dimension is left open.

    Raises:
        UserError: onnx is not installed.
        UnsupportedLayer: there is no rule for a layer.
        ValueError: see :func:`robust_app.folding.fold`.
    """
    onnx, graph, folded = packages.onnx(), Graph(), fold(network).float()
    for layer in flattened(folded):
        add_layer(layer, graph)
    if not graph.nodes:
        graph.add("Identity")
    graph.nodes[-1].output[0] = OUTPUT
    with torch.no_grad():
        logits = folded(torch.zeros(1, *image_shape))

    def described(name: str, shape: tuple[int, ...]) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])

    ends = [described(INPUT, image_shape)], [described(OUTPUT, tuple(logits.shape[1:]))]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "network", *ends, graph.constants),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="robust-app",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@singledispatch
def add_layer(layer: nn.Module, graph: Graph) -> None:
    """Add the operators of a layer.

    There are rules for Normalize, Conv2d, Linear, ReLU and Flatten, of which the networks of runs
    consist. One for a layer of your own is registered with ``@add_layer.register``.

    Raises:
        UnsupportedLayer: there is no rule for this type of layer, or for how it is set up.
    """
    del graph
    raise _RULES.unsupported(layer)


_RULES = Rules(add_layer, "ONNX operators")


@_RULES.of(Normalize)
def _normalize(layer: Normalize, graph: Graph) -> None:
    graph.add("Sub", layer.mean)
    graph.add("Div", layer.std)


@_RULES.of(nn.Conv2d)
def _conv2d(layer: nn.Conv2d, graph: Graph) -> None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise _RULES.unsupported(layer, "its padding is not a number of zeros")
    graph.add(
        "Conv",
        layer.weight,
        layer.bias,
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=layer.padding * 2,
        dilations=layer.dilation,
        group=layer.groups,
    )


@_RULES.of(nn.Linear)
def _linear(layer: nn.Linear, graph: Graph) -> None:
    graph.add("Gemm", layer.weight, layer.bias, transB=1)


@_RULES.of(nn.ReLU)
def _relu(layer: nn.ReLU, graph: Graph) -> None:
    del layer
    graph.add("Relu")


@_RULES.of(nn.Flatten)
def _flatten(layer: nn.Flatten, graph: Graph) -> None:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise _RULES.unsupported(layer, "it does not flatten whole images")
    graph.add("Flatten", axis=1)
