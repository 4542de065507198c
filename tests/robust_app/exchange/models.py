"""ONNX models by hand, and their outputs by ONNX Runtime."""

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper


def model(nodes, shape, constants=None, batch="batch", kind=TensorProto.FLOAT, output=("Y",)):
    """Nodes from X of a shape to the outputs; constants are tensors by name."""
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("X", kind, [batch, *shape])],
        [helper.make_tensor_value_info(name, kind, None) for name in output],
        [numpy_helper.from_array(value.numpy(), name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnx.shape_inference.infer_shapes(made)


def node(operator, *inputs, output="Y", **attributes):
    return helper.make_node(operator, inputs, [output], **attributes)


def by_runtime(made, x):
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=providers)
    return torch.tensor(session.run(None, {"X": x.numpy()})[0])
