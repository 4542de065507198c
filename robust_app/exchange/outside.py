"""Networks from elsewhere: an ONNX file, or a function in a Python file and its weights."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_app import archives
from robust_app.batches import as_float
from robust_app.data import Dataset
from robust_app.errors import UserError, one_line, shown
from robust_app.evaluation import CHUNK
from robust_app.exchange import packages
from robust_app.exchange.parity import check_parity
from robust_app.exchange.reading import from_onnx
from robust_app.exchange.tensors import read_model
from robust_app.layers import applied

PREFIXES = ("module.", "_orig_mod.")
"""What ``DataParallel`` and ``torch.compile`` put before the names of parameters."""

INSIDE = ("state_dict", "model_state_dict", "model", "network")
"""Where files keep a ``state_dict`` that is not all that they hold."""

SHOWN = 3
"""Names of parameters in an error; the others are counted."""


def from_file(path: Path, dataset: Dataset) -> nn.Sequential:
    """The network of an ONNX file, seen to compute what ONNX Runtime does.

    Args:
        path: of the file.
        dataset: whose images it is for, on the CPU.

    Raises:
        UserError: a package is missing, the file cannot be read, the network is no chain of known
            operators, is for other images, or its logits are not those of ONNX Runtime.
    """
    try:
        model = read_model(path)
        packages.onnx().checker.check_model(model)
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise almost anything
        raise UserError(f"{path}: cannot be read as ONNX ({_reason(error)})") from error
    try:
        network = from_onnx(model, dataset.image_shape)
        check_classifies(network, dataset)
        check_parity(model, network, as_float(dataset.x_test[:CHUNK]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return network


def from_function(where: str, weights: Path | None, dataset: Dataset) -> nn.Module:
    """The network that a function without arguments returns, with weights from a file.

    The function's file is run. Modules beside it can be imported, and it may register rules for
    layers of its own (see :func:`robust_app.bounds.propagate`).

    Args:
        where: ``FILE.py:FUNCTION``.
        weights: see :func:`load_weights`; None where the function has seen to them.
        dataset: whose images it is for, on the CPU.

    Raises:
        UserError: the file or the function is not there or fails, what it returns is no network
            for these images, or the weights are not of this network.
    """
    path, _, name = where.rpartition(":")
    if not path or not name:
        raise UserError(f"--model: expected FILE.py:FUNCTION, found {where!r}")
    module = _run(Path(path))
    make = getattr(module, name, None)
    if not callable(make):
        raise UserError(f"--model: no function {name} in {path}")
    try:
        network = make()
    except (Exception, SystemExit) as error:  # of the user's own code
        raise UserError(f"--model: {where} fails ({_reason(error)})") from error
    if not isinstance(network, nn.Module):
        found = type(network).__name__
        raise UserError(f"--model: expected {where} to return an nn.Module, found {found}")
    if weights is not None:
        load_weights(network, weights)
    try:
        check_classifies(network.eval(), dataset)
    except UserError as error:
        raise UserError(f"--model: {where}: {error}") from error
    return network


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a network's parameters and buffers; nothing in the file is executed.

    Args:
        network: filled in place.
        path: of what ``torch.save`` wrote: a ``state_dict``, or a dictionary with one under a key
            of :data:`INSIDE`. :data:`PREFIXES` of its names are left out.

    Raises:
        UserError: the file cannot be read, or is of another network; the line names parameters.
    """
    try:
        content = archives.read_tensors(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as a state_dict ({_reason(error).split('. ')[0]})"
        ) from error
    for key in INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"{path}: expected a state_dict, or a dictionary with one under "
            f"{', '.join(INSIDE)}, found {_kinds(content)}"
        )
    state = {_stripped(str(name)): value for name, value in content.items()}
    expected = network.state_dict()
    shared = expected.keys() & state.keys()
    problems = {
        "missing": expected.keys() - state.keys(),
        "not of this network": state.keys() - expected.keys(),
        "of another shape": {n for n in shared if state[n].shape != expected[n].shape},
        "no real floating-point numbers": {
            n
            for n in shared
            if expected[n].is_floating_point() and not state[n].is_floating_point()
        },
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise UserError(f"{path}: does not fit the network; {found}")
    network.load_state_dict(state)


@torch.no_grad()
def check_classifies(network: nn.Module, dataset: Dataset) -> None:
    """See that a network gives images of a data set a logit for each class, or more of them.

    Args:
        network: in evaluation mode, on the device of the data.
        dataset: its first test images are used.

    Raises:
        UserError: it does not take them, or gives something else, or no finite numbers, or has no
            gradient there.
    """
    x = as_float(dataset.x_test[:2])
    try:
        logits = applied(network, x)
    except Exception as error:  # of the user's own code, perhaps
        raise UserError(
            f"does not take images of shape {dataset.image_shape} ({_reason(error)})"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    wanted = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(x)
    if not wanted or logits.shape[1] < dataset.classes:
        raise UserError(
            f"expected at least {dataset.classes} logits for each of {len(x)} images, found {shape}"
        )
    if not logits.isfinite().all():
        found = logits[~logits.isfinite()][0].item()
        state = network.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        spoiled = {name for name, value in tensors.items() if not value.isfinite().all()}
        where = f"; not finite: {_some(spoiled)}" if spoiled else ""
        raise UserError(f"expected finite logits, found {found}{where}")
    try:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            torch.autograd.grad(applied(network, x).sum(), x)
    except RuntimeError as error:
        raise UserError(
            f"has no gradient at its images, which attacks need ({_reason(error)})"
        ) from error


def _run(path: Path) -> Any:
    """The module that a Python file makes."""
    spec = importlib.util.spec_from_file_location(f"outside_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--model: no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent.resolve()))  # as where a script is run
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # of the user's own code
        raise UserError(f"--model: {path} fails ({_reason(error)})") from error
    return module


def _stripped(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _kinds(content: Any) -> str:
    """What a file holds that is no state_dict: of a dictionary, what in it are no tensors."""
    if not isinstance(content, dict):
        return type(content).__name__
    others = {str(name): value for name, value in content.items() if not isinstance(value, Tensor)}
    kinds = {f"{shown(name)} ({type(value).__name__})" for name, value in others.items()}
    return f"a dictionary with {_some(kinds)}"


def _some(names: set[str]) -> str:
    first = sorted(names)[:SHOWN]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def _reason(error: BaseException) -> str:
    """An error as part of a line."""
    name, text = type(error).__name__, one_line(error)
    return text if text == name else f"{name}: {text}"
