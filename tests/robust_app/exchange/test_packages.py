import sys

import pytest

from robust_app.errors import UserError
from robust_app.exchange import packages


@pytest.mark.parametrize(
    ("name", "take"), [("onnx", packages.onnx), ("onnxruntime", packages.onnxruntime)]
)
def test_without_a_package_it_says_what_to_install(name, take, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for part in ("checker", "helper", "numpy_helper", "reference"):
        monkeypatch.delitem(sys.modules, f"{name}.{part}", raising=False)
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        take()
