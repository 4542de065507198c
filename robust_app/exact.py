"""Complete answers: whether any image of the ball is misclassified, by mixed-integer programming.

The network becomes linear constraints with one binary variable for each ReLU whose sign is open
(Tjeng et al. 2019), between the bounds of ``crown``'s stages, in float64. Needs SciPy, whose
solver is HiGHS.
"""

import copy
import enum
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robust_app.attacks import pgd
from robust_app.crown import Problem, margin_bound, optimize, relax, rows_at_once, tighten
from robust_app.interval import Interval
from robust_app.programming import Program
from robust_app.pullback import LinearBound, pull_back
from robust_app.relaxation import Trace, is_relu

TOLERANCE = 1e-6
"""A margin that can be this small is not proved: more than what the solver lets pass as 0."""

ATTACK_STEPS = 40
"""Of the attack from the image, and from a solution that the network classifies rightly."""


class Verdict(enum.Enum):
    """What is known about an image."""

    CERTIFIED = "certified"
    FALSIFIED = "falsified"
    UNDECIDED = "undecided"


class Decision(NamedTuple):
    """An answer about one image.

    Attributes:
        verdict: falsified only with a counterexample, certified only by proof.
        counterexample: a misclassified image of the ball, ``(...)``, or None.
    """

    verdict: Verdict
    counterexample: Tensor | None = None


def decided(
    network: nn.Module, x: Tensor, labels: Tensor, epsilon: float, *, time_limit: float
) -> tuple[Tensor, Tensor]:
    """:func:`decide` for each image: whether it is certified, and whether falsified.

    Returns:
        Two tensors of booleans ``(batch,)``; an image in neither is undecided.
    """
    verdicts = [
        decide(network, image, label, epsilon, time_limit=time_limit).verdict
        for image, label in zip(x, labels.tolist(), strict=True)
    ]
    certified, falsified = (
        torch.tensor([verdict is which for verdict in verdicts], dtype=torch.bool, device=x.device)
        for which in (Verdict.CERTIFIED, Verdict.FALSIFIED)
    )
    return certified, falsified


@torch.no_grad()
def decide(
    network: nn.Module, image: Tensor, label: int, epsilon: float, *, time_limit: float
) -> Decision:
    """Prove that the class is kept in the whole ball, or find where it is not.

    Args:
        network: a chain of affine layers and ReLU, as ``crown`` takes; in evaluation mode.
        image: in [0, 1], ``(...)``, without a batch dimension.
        label: the true class.
        epsilon: l_inf radius >= 0 in pixels of [0, 1].
        time_limit: in seconds; undecided when it runs out. Checked between the solver's steps, so
            bounds that take longer finish.

    Raises:
        UserError: SciPy is not installed.
        UnsupportedLayer: a layer that ``crown`` cannot relax.

    >>> decide(nn.Identity(), torch.tensor([0.7, 0.4]), 0, 0.1, time_limit=10.0)
    Decision(verdict=<Verdict.CERTIFIED: 'certified'>, counterexample=None)
    """
    deadline = time.monotonic() + time_limit
    x, labels = image.unsqueeze(0), torch.tensor([label])
    # Programs are slow to find what an attack finds at once.
    found = _misclassified_near(network, x, x, label, epsilon)
    if found is not None:
        return Decision(Verdict.FALSIFIED, found)

    exact = copy.deepcopy(network).double().cpu()
    problem = Problem.of(exact, Interval.around(x.double().cpu(), epsilon), labels)
    for stage in (relax, optimize, tighten, relax, optimize):
        problem = stage(problem)
        if problem.proved:
            return Decision(Verdict.CERTIFIED)

    encoding = _encoded(problem.trace)
    verdict = Verdict.CERTIFIED
    for other in problem.margins[0].argsort().tolist():  # the likeliest counterexample first
        if problem.margins[0, other] > 0:
            break
        margin = margin_bound(problem.trace, labels.unsqueeze(1), torch.tensor([[other]]))
        costs, constant = encoding.in_columns(margin)
        answer = encoding.program.minimum_below(
            encoding.columns,
            costs.squeeze(0),
            TOLERANCE - constant.item(),
            deadline - time.monotonic(),
        )
        if answer.solution is not None:
            candidate = answer.solution[: x.numel()].view_as(x).to(x)
            found = _misclassified_near(network, candidate, x, label, epsilon)
            if found is not None:
                return Decision(Verdict.FALSIFIED, found)
        if not answer.infeasible:
            verdict = Verdict.UNDECIDED
    return Decision(verdict)


# --- The network as constraints --------------------------------------------------------------


class _Encoding(NamedTuple):
    """Constraints on the values that enter some layers.

    Attributes:
        program: the constraints; its first variables are the image.
        columns: the program's variables of those values that are not known to be 0.
        live: which of all the values, flat, those are.
        layers: affine layers that follow.
    """

    program: Program
    columns: Tensor
    live: Tensor
    layers: Trace

    def in_columns(self, bound: LinearBound) -> tuple[Tensor, Tensor]:
        """Functions ``(1, spec)`` after the layers: coefficients ``(spec, n)``, constants."""
        for layer, box in reversed(self.layers):
            bound = pull_back(layer, bound, box.center.shape[1:])
        return bound.coefficients.flatten(2)[0][:, self.live], bound.constant[0]


def _encoded(trace: Trace) -> _Encoding:
    """The network of one image up to its last ReLU, and the layers after that."""
    image = trace[0][1]
    program = Program()
    columns = program.variables(image.lower.flatten(), image.upper.flatten())
    encoding = _Encoding(program, columns, torch.arange(len(columns)), [])
    for layer, box in trace:
        if is_relu(layer):
            encoding = _after_relu(encoding, layer, box)
        else:
            encoding = encoding._replace(layers=[*encoding.layers, (layer, box)])
    return encoding


def _after_relu(before: _Encoding, relu: nn.Module, box: Interval) -> _Encoding:
    """Add variables z for the inputs of a ReLU, and h for its outputs where the sign is open.

    Outputs known to be 0 have no variable, those known to be z have that of z.
    """
    program, shape = before.program, box.center.shape[1:]
    lower, upper = box.lower.flatten(), box.upper.flatten()
    live = (upper > 0).nonzero().squeeze(1)
    lower, upper = lower[live], upper[live]
    z = program.variables(lower, upper)
    at_once = rows_at_once([*before.layers, (relu, box)])
    for rows in torch.split(torch.arange(len(live)), at_once):
        one_hot = torch.zeros(1, len(rows), shape.numel(), dtype=lower.dtype)
        one_hot[0, torch.arange(len(rows)), live[rows]] = 1
        outputs = LinearBound(one_hot.view(1, -1, *shape), one_hot.new_zeros(1, len(rows)))
        matrix, constant = before.in_columns(outputs)
        minus_z = (-torch.ones_like(constant), z[rows])
        program.constrain([(matrix, before.columns), minus_z], -constant, -constant)

    open_sign = (lower < 0).nonzero().squeeze(1)
    z_open, lower, upper = z[open_sign], lower[open_sign], upper[open_sign]
    zero, one = torch.zeros_like(upper), torch.ones_like(upper)
    h = program.variables(zero, upper)
    active = program.variables(zero, one, integer=True)
    # h >= z;  h <= z - lower (1 - active);  h <= upper active.
    program.constrain([(one, h), (-one, z_open)], zero, one * torch.inf)
    program.constrain([(one, h), (-one, z_open), (-lower, active)], -one * torch.inf, -lower)
    program.constrain([(one, h), (-upper, active)], -one * torch.inf, zero)
    return _Encoding(program, z.index_copy(0, open_sign, h), live, [])


# --- Counterexamples -------------------------------------------------------------------------


def _misclassified_near(
    network: nn.Module, candidate: Tensor, x: Tensor, label: int, epsilon: float
) -> Tensor | None:
    """A misclassified image of the ball, ``(...)``: the candidate, or what an attack makes of it.

    The solver's tolerances and the network's rounding may leave the candidate on the right side.
    """
    labels = torch.tensor([label], device=x.device)
    candidate = torch.clamp(candidate, (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1))
    if _misclassified(network, candidate, label):
        return candidate.squeeze(0)
    # A start is in units of ε: with none, the ball is the image itself.
    start = (candidate - x) / epsilon if epsilon > 0 else torch.zeros_like(x)
    attacked = pgd(
        network,
        x,
        labels,
        epsilon,
        start=start,
        steps=ATTACK_STEPS,
        step_size=2.5 * epsilon / ATTACK_STEPS,
    )
    return attacked.squeeze(0) if _misclassified(network, attacked, label) else None


def _misclassified(network: nn.Module, x: Tensor, label: int) -> bool:
    return bool((network(x).argmax(1) != label).any())
