"""Every format that is damaged."""

from collections.abc import Callable, Mapping

from tests.fuzz import graphs, images, tensors, texts
from tests.fuzz.formats import Format

FORMATS: Mapping[str, Callable[[], Format]] = {
    "checkpoint": tensors.checkpoint,
    "network": tensors.network,
    "weights": tensors.weights,
    "npz": images.npz,
    "idx": images.idx,
    "cifar10": images.cifar10,
    "config": texts.config,
    "recipe": texts.recipe,
    "metrics": texts.metrics,
    "environment": texts.environment,
    "results": texts.results,
    "onnx": graphs.graph,
}
