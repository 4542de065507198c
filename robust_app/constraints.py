"""A network of ReLU as the constraints of a mixed-integer program (Tjeng et al. 2019)."""

import torch
from torch import Tensor, nn

from robust_app.interval import Interval
from robust_app.programming import Program
from robust_app.pullback import LinearBound, pull_back
from robust_app.relaxation import Trace, is_relu, rounding
from robust_app.tightening import rows_at_once

Terms = list[tuple[Tensor, Tensor]]
"""Matrices, each with the indices of the variables that it multiplies: as of Program."""


def add_network(program: Program, trace: Trace) -> list[Tensor]:
    """Add the network of one image.

    Variables are the image, and for each neuron whose sign is open its input z, its output h and
    whether it is active. What lies between are linear functions of these.

    Returns:
        The indices of the image's variables and of each ReLU's h.
    """
    box = trace[0][1]
    variables = [program.variables(box.lower.flatten(), box.upper.flatten())]
    for position, (layer, box) in enumerate(trace):
        if is_relu(layer):
            variables.append(_add_relu(program, trace[:position], variables, box))
    return variables


def _add_relu(program: Program, before: Trace, variables: list[Tensor], box: Interval) -> Tensor:
    neurons = _open_signs(box)
    lower, upper = box.lower.flatten()[neurons], box.upper.flatten()[neurons]
    z = program.variables(lower, upper)
    zero, one = torch.zeros_like(upper), torch.ones_like(upper)
    h = program.variables(zero, upper)
    active = program.variables(zero, one, integer=True)
    # h >= z;  h <= z - lower (1 - active);  h <= upper active.
    program.constrain([(one, h), (-one, z)], zero, one * torch.inf)
    program.constrain([(one, h), (-one, z), (-lower, active)], -one * torch.inf, -lower)
    program.constrain([(one, h), (-upper, active)], -one * torch.inf, zero)

    values = box.center.numel()
    at_once = rows_at_once([*before, (nn.ReLU(), box)])
    for rows in torch.split(torch.arange(len(neurons)), at_once):
        one_hot = torch.zeros(1, len(rows), values, dtype=lower.dtype)
        one_hot[0, torch.arange(len(rows)), neurons[rows]] = 1
        outputs = LinearBound(
            one_hot.view(1, -1, *box.center.shape[1:]), one_hot.new_zeros(1, len(rows))
        )
        terms, constant, slack = in_variables(before, outputs, variables)
        slack = slack + rounding(outputs, box)[0]
        program.constrain([*terms, (-one[rows], z[rows])], -slack - constant, slack - constant)
    return h


def in_variables(
    trace: Trace, function: LinearBound, variables: list[Tensor]
) -> tuple[Terms, Tensor, Tensor]:
    """Linear functions ``(1, spec)`` of a layer's outputs, in the variables before it.

    Returns:
        Terms, a constant, and what rounding may add to them or take from them.
    """
    terms: Terms = []
    slack = torch.zeros_like(function.constant)
    image, *hidden = variables
    for layer, box in reversed(trace):
        coefficients = function.coefficients
        if is_relu(layer):
            terms.append((coefficients.flatten(2)[0][:, _open_signs(box)], hidden.pop()))
            function = LinearBound(coefficients * (box.lower >= 0), function.constant)
        else:
            function = pull_back(layer, function, box.center.shape[1:])
        slack = slack + rounding(function, box)
    terms.append((function.coefficients.flatten(2)[0], image))
    return terms, function.constant[0], slack[0]


def _open_signs(box: Interval) -> Tensor:
    """The neurons of one image whose sign is open, flat."""
    return ((box.lower < 0) & (box.upper > 0)).flatten().nonzero().squeeze(1)
