"""Whether an ONNX model computes what a network does, as ONNX Runtime sees it."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust_app.errors import UserError, one_line
from robust_app.exchange import packages
from robust_app.layers import applied

LARGEST_BATCH = 10_000
"""That a model may be fixed to: as many images are made of those that there are."""

ROOM = 16
"""How many times float32's own rounding two orders of summation may differ by."""


class Parity(NamedTuple):
    """How far two computations of the same logits lie apart.

    Attributes:
        difference: the largest of all logits, NaN if any is.
        tolerance: what rounding to float32 explains.
    """

    difference: float
    tolerance: float


@torch.no_grad()
def parity(model: Any, network: nn.Module, x: Tensor) -> Parity:
    """Compare an ``onnx.ModelProto``'s logits with a network's.

    The tolerance is :data:`ROOM` times the largest error that float32 makes on these images, by
    the same network in float64, or times the spacing of floats at the largest logit if that is
    more. A layer that is wrong differs by orders of magnitude more.

    Args:
        model: its input may have a fixed batch dimension and another shape, of as many numbers.
        network: in float32 and evaluation mode, on the CPU.
        x: images in [0, 1], ``(batch, C, H, W)``, at least one.

    Raises:
        UserError: onnxruntime is not installed, does not run the model, or computes another
            number of logits.
    """
    logits = applied(network, x)
    exact = copy.deepcopy(network).double()(x.double())
    rounding = (logits - exact).abs().max()
    spacing = torch.finfo(torch.float32).eps * exact.abs().max()
    outputs = _by_runtime(model, x)
    if outputs.numel() != logits.numel():
        raise UserError(
            f"ONNX Runtime computes outputs of shape {tuple(outputs.shape)} for {len(x)} images, "
            f"torch logits of shape {tuple(logits.shape)}"
        )
    difference = (outputs.view_as(logits) - logits).abs().max()
    return Parity(difference.item(), ROOM * max(rounding.item(), spacing.item()))


def check_parity(model: Any, network: nn.Module, x: Tensor) -> Parity:
    """:func:`parity`, refused where the difference is beyond the tolerance.

    Raises:
        UserError: it is, or see :func:`parity`.
    """
    found = parity(model, network, x)
    if not found.difference <= found.tolerance:  # NaN is refused too
        raise UserError(
            f"the logits by ONNX Runtime and by torch differ by up to {found.difference:.2g}; "
            f"rounding explains {found.tolerance:.2g}"
        )
    return found


def _by_runtime(model: Any, x: Tensor) -> Tensor:
    """The model's outputs, in float64."""
    runtime = packages.onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # its warnings are of no use to the user
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        [image] = session.get_inputs()
        batch, *shape = image.shape
        size = batch if isinstance(batch, int) else len(x)
        if not 0 < size <= LARGEST_BATCH:
            raise ValueError(f"a batch of {size}")
        whole = torch.arange(-(-len(x) // size) * size) % len(x)  # batches of a fixed size are full
        dtype = torch.float64 if image.type == "tensor(double)" else torch.float32
        outputs = [
            torch.tensor(session.run(None, {image.name: part.view(-1, *shape).numpy()})[0])
            for part in torch.split(x[whole].to(dtype), size)
        ]
        return torch.cat(outputs)[: len(x)].double()
    except Exception as error:  # of many kinds, all its own
        raise UserError(f"ONNX Runtime does not run the model ({one_line(error)})") from error
