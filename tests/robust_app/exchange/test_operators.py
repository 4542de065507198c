"""Each operator beside ONNX Runtime."""

import pytest
import torch

from robust_app.errors import UserError
from robust_app.exchange.operators import LAYERS
from robust_app.exchange.reading import from_onnx
from tests.robust_app.exchange.models import by_runtime, model, node

IMAGE, VECTOR = (4, 6, 5), (6,)
C = torch.Generator().manual_seed(0)


def values(*shape):
    return torch.randn(shape, generator=C)


def integers(*numbers):
    return torch.tensor(numbers)


# Name: the operator, the shape of one image, its constants in order (None: the image), attributes.
CASES = {
    "relu": ("Relu", IMAGE, [None], {}),
    "leaky relu": ("LeakyRelu", IMAGE, [None], {"alpha": 0.3}),
    "leaky relu, default": ("LeakyRelu", IMAGE, [None], {}),
    "elu": ("Elu", IMAGE, [None], {"alpha": 0.7}),
    "elu, default": ("Elu", IMAGE, [None], {}),
    "sigmoid": ("Sigmoid", VECTOR, [None], {}),
    "tanh": ("Tanh", VECTOR, [None], {}),
    "identity": ("Identity", IMAGE, [None], {}),
    "dropout": ("Dropout", IMAGE, [None, torch.tensor(0.5)], {}),
    "gemm": ("Gemm", VECTOR, [None, values(6, 3), values(3)], {}),
    "gemm, all set": (
        *("Gemm", VECTOR, [None, values(3, 6), values(1, 3)]),
        {"transB": 1, "alpha": 0.5, "beta": -2.0},
    ),
    "gemm, one bias for all": ("Gemm", VECTOR, [None, values(6, 3), values(1)], {}),
    "gemm without bias": ("Gemm", VECTOR, [None, values(6, 3)], {}),
    "matmul": ("MatMul", VECTOR, [None, values(6, 3)], {}),
    "conv": ("Conv", IMAGE, [None, values(3, 4, 3, 2), values(3)], {}),
    "conv, all set": (
        *("Conv", IMAGE, [None, values(6, 2, 3, 2)]),
        {"strides": [2, 1], "pads": [1, 2, 1, 2], "dilations": [2, 1], "group": 2},
    ),
    "batch norm of images": (
        *("BatchNormalization", IMAGE),
        [None, values(4), values(4), values(4), values(4).square()],
        {"epsilon": 0.1},
    ),
    "batch norm of vectors": (
        *("BatchNormalization", VECTOR),
        [None, values(6), values(6), values(6), values(6).square()],
        {},
    ),
    "max pool": ("MaxPool", IMAGE, [None], {"kernel_shape": [3, 2]}),
    "max pool, all set": (
        *("MaxPool", IMAGE, [None]),
        {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 0], "dilations": [2, 1]},
    ),
    "max pool, ceil": (
        *("MaxPool", IMAGE, [None]),
        {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
    ),
    "average pool": ("AveragePool", IMAGE, [None], {"kernel_shape": [2, 2], "strides": [2, 1]}),
    "average pool, padded": (
        *("AveragePool", IMAGE, [None]),
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    ),
    "average pool, padding counted": (
        *("AveragePool", IMAGE, [None]),
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "global average pool": ("GlobalAveragePool", IMAGE, [None], {}),
    "flatten": ("Flatten", IMAGE, [None], {}),
    "reshape to flat": ("Reshape", IMAGE, [None, integers(-1, 120)], {}),
    "reshape that keeps a size": ("Reshape", IMAGE, [None, integers(0, 0, -1)], {}),
    "reshape back": ("Reshape", VECTOR, [None, integers(-1, 2, 3, 1)], {}),
    "add": ("Add", IMAGE, [None, values(4, 1, 1)], {}),
    "add before": ("Add", VECTOR, [values(6), None], {}),
    "sub": ("Sub", IMAGE, [None, values(1, 4, 6, 5)], {}),
    "sub from": ("Sub", IMAGE, [values(6, 1), None], {}),
    "mul": ("Mul", IMAGE, [None, torch.tensor(-2.0)], {}),
    "div": ("Div", IMAGE, [None, values(4, 1, 1)], {}),
}


def of(case, batch="batch"):
    operator, shape, constants, attributes = case
    names = ["X" if value is None else f"c{i}" for i, value in enumerate(constants)]
    given = {f"c{i}": value for i, value in enumerate(constants) if value is not None}
    return model([node(operator, *names, **attributes)], shape, given, batch), shape


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_layer_computes_what_the_operator_does(case):
    made, shape = of(case)
    x = torch.randn(3, *shape)
    with torch.no_grad():
        ours = from_onnx(made, shape)(x)
    torch.testing.assert_close(ours, by_runtime(made, x), atol=1e-5, rtol=1e-5)


def test_every_operator_is_beside_the_runtime():
    assert {operator for operator, *_ in CASES.values()} == set(LAYERS)


REFUSED = {
    "softmax": (("Softmax", VECTOR, [None], {}), "operator Softmax: no layer here computes it"),
    "gemm with a bias for others": (
        ("Gemm", (4,), [None, values(4, 10), values(5)], {}),
        r"node Y, operator Gemm: does not fit its input of shape \(4,\) \(The expanded size",
    ),
    "gemm with a stack of matrices": (
        ("Gemm", VECTOR, [None, values(2, 6, 3)], {}),
        r"Gemm: expected a matrix, found shape \(2, 6, 3\)",
    ),
    "a slope that is text": (("LeakyRelu", VECTOR, [None], {"alpha": "a"}), "LeakyRelu: cannot be"),
    "image as second factor": (("MatMul", (6, 2), [values(3, 6), None], {}), "MatMul: the image"),
    "image as divisor": (("Div", VECTOR, [values(6), None], {}), "Div: the image is its divisor"),
    "batched matrices": (("MatMul", (2, 6), [None, values(2, 6, 3)], {}), r"matrix, .*\(2, 6, 3\)"),
    "conv of three dimensions": (
        ("Conv", (1, 4, 4, 4), [None, values(1, 1, 2, 2, 2)], {}),
        r"Conv: expected one of images",
    ),
    "conv padded at one end": (
        ("Conv", IMAGE, [None, values(3, 4, 3, 2)], {"pads": [0, 0, 1, 1]}),
        r"Conv: expected the same padding .* \(0, 0, 1, 1\)",
    ),
    "conv padded by itself": (
        ("Conv", IMAGE, [None, values(3, 4, 3, 3)], {"auto_pad": "SAME_UPPER"}),
        "Conv: auto_pad SAME_UPPER",
    ),
    "conv of other channels": (
        ("Conv", IMAGE, [None, values(3, 2, 3, 3)], {}),
        r"Conv: does not fit its input of shape \(4, 6, 5\)",
    ),
    "conv of groups that do not share out": (
        ("Conv", (3, 6, 6), [None, values(4, 1, 3, 3)], {"group": 3}),
        r"Conv: does not fit its input of shape \(3, 6, 6\) \(out_channels must be divisible",
    ),
    "pooling of sequences": (("MaxPool", VECTOR * 2, [None], {"kernel_shape": [2]}), "MaxPool: "),
    "dilated average": (
        ("AveragePool", IMAGE, [None], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
        "AveragePool: ",
    ),
    "flatten of something else": (("Flatten", IMAGE, [None], {"axis": 2}), "Flatten: .* found 2"),
    "reshape across images": (("Reshape", IMAGE, [None, integers(6, -1, 7)], {}), "Reshape: "),
    "reshape to no dimension": (
        ("Reshape", VECTOR, [None, torch.empty(0, dtype=torch.int64)], {}),
        "Reshape: expected a batch and an image, found no dimension",
    ),
    "reshape of all images to one row": (
        ("Reshape", IMAGE, [None, integers(-1)], {}),
        r"Reshape: \(4, 6, 5\) to \[\] does not keep images apart",
    ),
    "a constant larger than the image": (("Add", (1,), [None, values(6)], {}), r"Add: .*\(6,\)"),
    "training": (
        ("Dropout", IMAGE, [None, torch.tensor(0.5), torch.tensor(True)], {}),
        "Dropout: it is in training mode",
    ),
}


@pytest.mark.parametrize(("case", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_layer_computes_is_refused_by_name(case, message):
    made, shape = of(case)
    with pytest.raises(UserError, match=message):
        from_onnx(made, shape)
