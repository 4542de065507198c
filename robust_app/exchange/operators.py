"""What layer an ONNX operator is, by its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from robust_app.errors import UserError
from robust_app.layers import ElementwiseAffine
from robust_app.small_patches import Conv2d


@dataclass(frozen=True)
class Node:
    """An operator on what is computed from the image, all its other inputs being constant.

    Attributes:
        operator: its name in ONNX.
        inputs: its constants, in float32 those that are floats; None in the place of the image and
            of what is left out.
        place: of the input that is computed from the image.
        shape: of that input, without the batch dimension.
        attributes: by name.
    """

    operator: str
    inputs: tuple[Tensor | None, ...]
    place: int
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]

    def check(self, holds: bool, why: str) -> None:
        """Refuse the operator unless a condition holds; who reads the model says which it is.

        Raises:
            UserError: it does not.
        """
        if not holds:
            raise UserError(why)

    def constant(self, place: int) -> Tensor:
        """A constant that must be there.

        Raises:
            UserError: it is not.
        """
        value = self.optional(place)
        if value is None:
            raise UserError(f"expected a constant as input {place}, found none")
        return value

    def optional(self, place: int) -> Tensor | None:
        """A constant, if it is there."""
        return self.inputs[place] if place < len(self.inputs) else None


Convert = Callable[[Node], nn.Module]
_Layer = TypeVar("_Layer", bound=nn.Module)

LAYERS: dict[str, Convert] = {
    "Relu": lambda _: nn.ReLU(),
    "Sigmoid": lambda _: nn.Sigmoid(),
    "Tanh": lambda _: nn.Tanh(),
    "Identity": lambda _: nn.Identity(),
    "LeakyRelu": lambda node: nn.LeakyReLU(node.attributes.get("alpha", 0.01)),
    "Elu": lambda node: nn.ELU(node.attributes.get("alpha", 1.0)),
    "GlobalAveragePool": lambda _: nn.AdaptiveAvgPool2d(1),
}
"""The layer of each operator that is known here; those below are added as they are defined."""


def _of(operator: str) -> Callable[[Convert], Convert]:
    def register(convert: Convert) -> Convert:
        LAYERS[operator] = convert
        return convert

    return register


# --- Affine layers ---------------------------------------------------------------------------


@_of("Gemm")
def _gemm(node: Node) -> nn.Module:
    """α A B + β C with A or its transpose, and B or its transpose."""
    get = node.attributes.get
    node.check(node.place == 0 and not get("transA", 0), "the image is not its first factor")
    weight = get("alpha", 1.0) * _matrix(node)
    bias = node.optional(2)
    weight = weight if get("transB", 0) else weight.T
    if bias is not None:
        bias = (get("beta", 1.0) * bias).expand(1, len(weight)).flatten()
    return _linear(weight, bias)


@_of("MatMul")
def _matmul(node: Node) -> nn.Module:
    node.check(node.place == 0, "the image is not its first factor")
    return _linear(_matrix(node).T, None)


def _matrix(node: Node) -> Tensor:
    weight = node.constant(1)
    node.check(weight.ndim == 2, f"expected a matrix, found shape {tuple(weight.shape)}")
    return weight


@_of("Conv")
def _conv(node: Node) -> nn.Module:
    weight, bias = node.constant(1), node.optional(2)
    node.check(weight.ndim == 4, f"expected one of images, found weights {tuple(weight.shape)}")
    outputs, inputs, height, width = weight.shape
    groups = node.attributes.get("group", 1)
    layer = Conv2d(
        inputs * groups,
        outputs,
        (height, width),
        _pair(node, "strides"),
        _padding(node),
        _pair(node, "dilations"),
        groups,
        bias is not None,
    )
    return _with_parameters(layer, weight, bias)


@_of("BatchNormalization")
def _batch_norm(node: Node) -> nn.Module:
    node.check(not node.attributes.get("training_mode", 0), "it is in training mode")
    weight, bias, mean, variance = (node.constant(place) for place in range(1, 5))
    kind = nn.BatchNorm2d if len(node.shape) == 3 else nn.BatchNorm1d
    layer = kind(len(weight), eps=node.attributes.get("epsilon", 1e-5))
    layer.running_mean, layer.running_var = mean, variance
    return _with_parameters(layer, weight, bias)


@_of("Add")
def _add(node: Node) -> nn.Module:
    return _elementwise(node, torch.tensor(1.0), _other(node))


@_of("Sub")
def _sub(node: Node) -> nn.Module:
    sign = torch.tensor(1.0 if node.place == 0 else -1.0)
    return _elementwise(node, sign, -sign * _other(node))


@_of("Mul")
def _mul(node: Node) -> nn.Module:
    return _elementwise(node, _other(node), torch.tensor(0.0))


@_of("Div")
def _div(node: Node) -> nn.Module:
    node.check(node.place == 0, "the image is its divisor")
    return _elementwise(node, 1 / _other(node), torch.tensor(0.0))


def _other(node: Node) -> Tensor:
    return node.constant(1 - node.place)


def _elementwise(node: Node, scale: Tensor, shift: Tensor) -> nn.Module:
    """A layer with numbers that are repeated wherever the image has more of them."""
    try:
        values = [value.expand(1, *node.shape)[0].clone() for value in (scale, shift)]
    except RuntimeError:
        shape = tuple(_other(node).shape)
        raise UserError(f"its constant {shape} does not fit {node.shape}") from None
    return ElementwiseAffine(*values)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    return _with_parameters(nn.Linear(inputs, outputs, bias is not None), weight, bias)


def _with_parameters(layer: _Layer, weight: Tensor, bias: Tensor | None) -> _Layer:
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


# --- Pooling and shapes ----------------------------------------------------------------------


@_of("MaxPool")
def _max_pool(node: Node) -> nn.Module:
    return nn.MaxPool2d(
        _pair(node, "kernel_shape"),
        _pair(node, "strides"),
        _padding(node),
        _pair(node, "dilations"),
        ceil_mode=bool(node.attributes.get("ceil_mode", 0)),
    )


@_of("AveragePool")
def _average_pool(node: Node) -> nn.Module:
    node.check(_pair(node, "dilations") == (1, 1), "it is dilated")
    return nn.AvgPool2d(
        _pair(node, "kernel_shape"),
        _pair(node, "strides"),
        _padding(node),
        ceil_mode=bool(node.attributes.get("ceil_mode", 0)),
        count_include_pad=bool(node.attributes.get("count_include_pad", 0)),
    )


@_of("Flatten")
def _flatten(node: Node) -> nn.Module:
    axis = node.attributes.get("axis", 1)
    node.check(axis in (1, -len(node.shape)), f"expected axis 1, found {axis}")
    return nn.Flatten()


@_of("Reshape")
def _reshape(node: Node) -> nn.Module:
    """To flat images or back; a batch of a fixed size is as good as any."""
    shape = node.constant(1)
    node.check(len(shape) > 0, "expected a batch and an image, found no dimension")
    _, *sizes = (int(size) for size in shape)
    try:
        if not node.attributes.get("allowzero", 0):
            sizes = [size or node.shape[i] for i, size in enumerate(sizes)]
        inner = torch.empty(node.shape, device="meta").view(sizes).shape
    except (RuntimeError, IndexError):
        raise UserError(f"{node.shape} to {sizes} does not keep images apart") from None
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, inner)) if len(inner) > 1 else nn.Flatten()


@_of("Dropout")
def _dropout(node: Node) -> nn.Module:
    training = node.optional(2)
    node.check(training is None or not training, "it is in training mode")
    return nn.Identity()


def _pair(node: Node, name: str) -> tuple[int, int]:
    """An attribute for height and width; 1 where it is left out."""
    values = tuple(node.attributes.get(name, (1, 1)))
    node.check(len(values) == 2, f"expected {name} of height and width, found {values}")
    return values


def _padding(node: Node) -> tuple[int, int]:
    """Of height and width, alike at both ends."""
    auto = node.attributes.get("auto_pad", b"NOTSET")
    node.check(auto in (b"NOTSET", b"VALID"), f"auto_pad {auto.decode()} is not supported")
    pads = tuple(node.attributes.get("pads", (0, 0, 0, 0)))
    node.check(
        len(pads) == 4 and pads[:2] == pads[2:],
        f"expected the same padding at both ends of height and width, found {pads}",
    )
    return pads[:2]
