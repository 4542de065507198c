"""Complete answers: whether any image of the ball is misclassified, by mixed-integer programming.

The network becomes linear constraints with one binary variable for each ReLU whose sign is open
(Tjeng et al. 2019), between the bounds of :mod:`robust_app.tightening`, in float64. Needs SciPy,
whose solver is HiGHS.
"""

import enum
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robust_app.attacks import pgd
from robust_app.certificates import ball, check_labels
from robust_app.constraints import add_network, in_variables
from robust_app.crown_margins import crown_margins, margin_bound
from robust_app.interval import ball_ends
from robust_app.layers import applied
from robust_app.plain_networks import as_network, in_float64
from robust_app.precision import plain_float32
from robust_app.programming import TOLERANCE, Program
from robust_app.tightening import TIGHTEST, Problem

NARROW = 1e-6
"""A ball of a smaller radius is too narrow for the solver, which takes near numbers for one."""

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
@plain_float32()
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
        TypeError: the image is no tensor.
        UserError: SciPy is not installed; see also :func:`~robust_app.plain_networks.as_network`
            and :func:`~robust_app.plain_networks.in_float64`.
        UnsupportedLayer: a layer that ``crown`` cannot relax.
        ValueError: the image is not in [0, 1], the radius below 0 or NaN, or the label no class of
            the network.

    >>> decide(nn.Identity(), torch.tensor([0.7, 0.4]), 0, 0.1, time_limit=10.0)
    Decision(verdict=<Verdict.CERTIFIED: 'certified'>, counterexample=None)
    """
    deadline = time.monotonic() + time_limit
    x, labels = as_network(image, network).unsqueeze(0), torch.tensor([label])
    program = Program()
    check_labels(labels, applied(network, x).shape)
    problem = Problem.of(in_float64(network).cpu(), ball(x.double().cpu(), epsilon), labels)
    # Refuses layers now, however easy the image is.
    crown_margins(problem.trace, labels)
    # Programs are slow to find what an attack finds at once.
    found = _misclassified_near(network, x, x, label, epsilon)
    if found is not None:
        return Decision(Verdict.FALSIFIED, found)

    for stage in TIGHTEST:
        problem = stage(problem)
        if problem.proved:
            return Decision(Verdict.CERTIFIED)

    if not _finite(problem) or 0 < epsilon < NARROW:
        return Decision(Verdict.UNDECIDED)
    variables = add_network(program, problem.trace)
    verdict = Verdict.CERTIFIED
    for other in problem.margins[0].argsort().tolist():  # the likeliest counterexample first
        if problem.margins[0, other] > 0:
            break
        margin = margin_bound(problem.margins, labels.unsqueeze(1), torch.tensor([[other]]))
        terms, constant, slack = in_variables(problem.trace, margin, variables)
        slack = slack + problem.errors[:, other]
        answer = program.minimum_below(
            torch.cat([indices for _, indices in terms]),
            torch.cat([matrix.squeeze(0) for matrix, _ in terms]),
            TOLERANCE + (slack - constant).item(),  # a margin that may be so small is not proved
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


def _finite(problem: Problem) -> bool:
    """Whether there are bounds to write into a program."""
    boxes = [values for _, box in problem.trace for values in (box.center, box.radius)]
    return all(bool(values.isfinite().all()) for values in (*boxes, problem.errors))


def _misclassified_near(
    network: nn.Module, candidate: Tensor, x: Tensor, label: int, epsilon: float
) -> Tensor | None:
    """A misclassified image of the ball, ``(...)``: the candidate, or what an attack makes of it.

    The solver's tolerances and the network's rounding may leave the candidate on the right side.
    """
    labels = torch.tensor([label], device=x.device)
    candidate = torch.clamp(candidate, *ball_ends(x, epsilon))
    if _misclassified(network, candidate, label):
        return candidate.squeeze(0)
    # A start is in units of ε: where that is too small to see, it is the image itself.
    start = torch.where(candidate == x, 0.0, (candidate - x) / (epsilon or 1.0))
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
    logits = applied(network, x)
    return bool(logits.isfinite().all() and (logits.argmax(1) != label).any())
