import onnx
import pytest
import torch
from torch import nn

from robust_app import models
from robust_app.exchange.writing import to_onnx
from robust_app.layer_rules import UnsupportedLayer
from robust_app.layers import Normalize
from tests.robust_app.exchange.models import by_runtime
from tests.robust_app.networks import digits_network, images

RGB = (3, 9, 7)


def rgb_network(name):
    torch.manual_seed(0)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    return models.build(name, RGB, classes=4, mean=mean, std=std).eval()


@pytest.mark.parametrize("name", ["dm-small", "cnn-small", "table-f-i"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_model_computes_what_the_network_does(name, batch):
    network, x = rgb_network(name), torch.rand(batch, *RGB)
    torch.testing.assert_close(by_runtime(to_onnx(network, RGB), x), network(x))


def test_a_network_without_layers_is_written():
    x = torch.rand(3, 4)
    torch.testing.assert_close(by_runtime(to_onnx(nn.Sequential().eval(), (4,)), x), x)


def test_batch_norm_is_folded():
    network = digits_network().eval().float()
    model, x = to_onnx(network, (1, 8, 8)), images().float()
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    torch.testing.assert_close(by_runtime(model, x), network(x), atol=1e-5, rtol=1e-5)


def test_a_convolution_keeps_all_its_settings():
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=False)
    network, x = nn.Sequential(convolution), torch.rand(3, 2, 8, 6)
    torch.testing.assert_close(by_runtime(to_onnx(network, (2, 8, 6)), x), network(x))


def test_operators_are_plain_and_the_batch_is_open():
    model = to_onnx(rgb_network("dm-small"), RGB)
    operators = [node.op_type for node in model.graph.node]
    assert operators == ["Sub", "Div", *["Conv", "Relu"] * 2, "Flatten", "Gemm", "Relu", "Gemm"]
    ends = [*model.graph.input, *model.graph.output]
    assert [value.name for value in ends] == ["X", "Y"]
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in ends]
    assert shapes == [["batch", *RGB], ["batch", 4]]
    assert model.opset_import[0].version <= 13
    assert all(value.data_type == onnx.TensorProto.FLOAT for value in model.graph.initializer)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Tanh(), "no ONNX operators for the layer Tanh"),
        (nn.Conv2d(1, 1, 3, padding="same"), "Conv2d: its padding"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "Conv2d: its padding"),
        (nn.Flatten(2), "Flatten: it does not flatten whole images"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(layer, message):
    with pytest.raises(UnsupportedLayer, match=message):
        to_onnx(nn.Sequential(Normalize([0.5], [0.5]), layer), (1, 4, 4))
