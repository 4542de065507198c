"""Chains of operators; each one alone is in test_operators.py."""

import itertools

import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from robust_app import models
from robust_app.crown import alpha_crown
from robust_app.errors import UserError
from robust_app.exchange.reading import from_onnx
from robust_app.exchange.writing import to_onnx
from robust_app.interval import Interval
from robust_app.margins import margin_bounds
from tests.robust_app.exchange.models import by_runtime, model, node

WEIGHT, BIAS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3)


def test_what_was_written_is_read_to_the_bit():
    torch.manual_seed(0)
    network = models.build("digits-cnn", (1, 8, 8), classes=10).eval()
    again = from_onnx(to_onnx(network, (1, 8, 8)), (1, 8, 8))
    assert [type(layer) for layer in again] == [type(layer) for layer in network]
    ours, theirs = network.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_bounds_of_a_network_with_normalisation_are_those_of_the_original():
    torch.manual_seed(0)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    network = models.build("dm-small", (3, 8, 8), 4, mean=mean, std=std).double().eval()
    again = from_onnx(to_onnx(network, (3, 8, 8)), (3, 8, 8)).double()
    x, labels = torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.arange(5) % 4
    box = Interval.around(x, 0.01)
    ours, theirs = (margin_bounds(each, box, labels) for each in (network, again))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    proved = [alpha_crown(each, x, network(x).argmax(1), 0.003) for each in (network, again)]
    assert torch.equal(*proved)
    assert proved[0].any()


def test_a_product_its_bias_and_its_scale_are_one_layer():
    """Else margins would be bounded after the bias, from logits, which is looser."""
    made = model(
        [
            node("MatMul", "X", "w", output="a"),
            node("Add", "a", "b", output="c"),
            node("Mul", "c", "s", output="d"),
            node("Sub", "d", "b"),
        ],
        (6,),
        {"w": WEIGHT, "b": BIAS, "s": torch.tensor([1.0, -2.0, 3.0])},
    )
    network, x = from_onnx(made, (6,)), torch.rand(4, 6)
    assert [type(layer) for layer in network] == [nn.Linear]
    torch.testing.assert_close(network(x), by_runtime(made, x))


def test_a_product_of_rows_keeps_the_bias_apart():
    """Which differs from row to row, as a Linear's cannot."""
    made = model(
        [node("MatMul", "X", "w", output="a"), node("Add", "a", "b")],
        (2, 6),
        {"w": WEIGHT, "b": torch.arange(6.0).view(2, 3)},
    )
    x = torch.rand(4, 2, 6)
    torch.testing.assert_close(from_onnx(made, (2, 6))(x), by_runtime(made, x))


def test_what_depends_on_constants_alone_is_computed():
    matrix = numpy_helper.from_array(WEIGHT.T.contiguous().numpy())
    made = model(
        [
            helper.make_node("Constant", [], ["k"], value=matrix),
            node("Transpose", "k", output="w", perm=[1, 0]),
            node("Mul", "w", "two", output="w2"),
            node("MatMul", "X", "w2"),
        ],
        (6,),
        {"two": torch.tensor(2.0)},
    )
    x = torch.rand(4, 6)
    torch.testing.assert_close(from_onnx(made, (6,))(x), x @ (2 * WEIGHT))


def test_shapes_are_computed_for_any_batch():
    """As torch's older exporter writes ``x.view(x.size(0), -1)``."""
    made = model(
        [
            node("Relu", "X", output="a"),
            node("Shape", "a", output="s"),
            node("Gather", "s", "zero", output="n"),
            node("Concat", "n", "rest", output="to", axis=0),
            node("Reshape", "a", "to"),
        ],
        (1, 2, 3),
        {"zero": torch.tensor([0]), "rest": torch.tensor([-1])},
    )
    x = torch.randn(4, 1, 2, 3)
    assert torch.equal(from_onnx(made, (1, 2, 3))(x), x.relu().flatten(1))


def test_a_batch_of_one_and_doubles_are_read_for_any_batch_in_float32():
    nodes = [node("Reshape", "X", "s", output="f"), node("MatMul", "f", "w")]
    constants = {"s": torch.tensor([1, 6]), "w": WEIGHT.double()}
    made = model(nodes, (1, 2, 3), constants, batch=1, kind=helper.TensorProto.DOUBLE)
    x = torch.rand(4, 1, 2, 3)
    torch.testing.assert_close(from_onnx(made, (1, 2, 3))(x), x.flatten(1) @ WEIGHT)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6, 1), (2, 3), (2, 3, 1), (1, 2, 3)])
def test_images_enter_in_the_shape_of_the_model(shape):
    made = model([node("Flatten", "X", output="f"), node("MatMul", "f", "w")], shape, {"w": WEIGHT})
    x = torch.rand(4, 1, 2, 3)
    torch.testing.assert_close(from_onnx(made, (1, 2, 3))(x), x.flatten(1) @ WEIGHT)


@pytest.mark.parametrize("shape", [(5,), (3, 2), (3, 2, 1), (1, 2, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match=r"takes images of shape .* data set have \(1, 2, 3\)"):
        from_onnx(model([node("Relu", "X")], shape), (1, 2, 3))


def test_channels_that_come_last_are_refused():
    """For as many numbers are no reason to take them in another order."""
    with pytest.raises(UserError, match=r"\(8, 8, 3\).*\(3, 8, 8\)"):
        from_onnx(model([node("Relu", "X")], (8, 8, 3)), (3, 8, 8))


def chain(length):
    names = ["X", *(f"h{number}" for number in range(1, length)), "Y"]
    nodes = [node("Relu", a, output=b) for a, b in itertools.pairwise(names)]
    return model(nodes, (6,))


def test_a_chain_of_more_operators_than_anyone_needs_is_refused():
    assert len(from_onnx(chain(1000), (6,))) == 1000
    with pytest.raises(UserError, match=r"^expected at most 1000 operators, found 1001$"):
        from_onnx(chain(1001), (6,))


def two_inputs():
    made = model([node("Relu", "X")], (6,))
    made.graph.input.append(helper.make_tensor_value_info("Z", helper.TensorProto.FLOAT, [1]))
    return made


REFUSED = {
    "a sum of two branches": (
        lambda: model([node("Relu", "X", output="a"), node("Add", "X", "a")], (6,)),
        "operator Add: expected a chain, .* found the inputs X, a",
    ),
    "the shape of something else": (
        lambda: model(
            [
                node("Relu", "X", output="a"),
                node("Shape", "X", output="s"),
                node("Reshape", "a", "s"),
            ],
            (6,),
        ),
        "operator Shape: expected a chain",
    ),
    "two inputs": (two_inputs, "expected one input, found 2"),
    "two outputs": (
        lambda: model([node("Relu", "X", output="a"), node("Relu", "a")], (6,), output=("a", "Y")),
        "expected one output, of the last operator, found a, Y",
    ),
    "an open size": (lambda: model([node("Relu", "X")], ("width",)), "known size.*'width'"),
    "constants that do not fit each other": (
        lambda: model(
            [
                helper.make_node("MatMul", ["w", "w"], ["k"], name="square"),
                node("MatMul", "X", "k"),
            ],
            (6,),
            {"w": WEIGHT},
        ),
        "node square, operator MatMul: the sizes of its constants do not tell",
    ),
    "a constant that is missing": (
        lambda: model([node("Dropout", "X"), node("Gemm", "Y", "Y", output="Z")], (6,)),
        "operator Gemm: expected a chain",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_chain_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        from_onnx(make(), (6,))
