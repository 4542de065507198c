"""The packages that this exchange needs, imported where they are used."""

from importlib import import_module
from typing import Any

from robust_app.errors import UserError

PARTS = (
    "checker",
    "external_data_helper",
    "helper",
    "numpy_helper",
    "reference",
    "shape_inference",
)


def onnx() -> Any:
    """The package onnx, with the parts used here.

    Raises:
        UserError: it is not installed.
    """
    for part in PARTS:
        _imported(f"onnx.{part}")
    return _imported("onnx")


def onnxruntime() -> Any:
    """The package onnxruntime.

    Raises:
        UserError: it is not installed.
    """
    return _imported("onnxruntime")


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError("ONNX files need two packages: pip install onnx onnxruntime") from error
