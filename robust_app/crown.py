"""Verifiers tighter than interval bounds, by linear relaxation.

``crown_ibp``, ``alpha_crown_ibp``, ``crown`` and ``alpha_crown`` run through stages, each for the
images that those before it left open. All take a network in evaluation mode, images in [0, 1]
``(batch, ...)``, their classes, int64 ``(batch,)``, and ε >= 0 in pixels of [0, 1], and return
booleans ``(batch,)``: true where each margin over another class, as float32 computes it, is proved
to be above 0 (:mod:`robust_app.certificates`). What one stage proves stays proved, so ``crown_ibp``
proves all that interval bounds prove, ``crown`` and ``alpha_crown_ibp`` all that ``crown_ibp``
does, ``alpha_crown`` all that any does. Sources: CROWN, Zhang et al. 2018; CROWN-IBP, Zhang et al.
2020; optimised slopes, Xu et al. 2021.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_app.certificates import ball, check_labels, enclosures
from robust_app.crown_margins import crown_margins
from robust_app.interval import check_images
from robust_app.layers import applied
from robust_app.plain_networks import as_network, in_float64
from robust_app.precision import plain_float32
from robust_app.tightening import (
    TIGHTEST,
    Problem,
    Tightening,
    optimize,
    relax,
    rows_at_once,
    tighten,
)


@torch.no_grad()
@plain_float32()
def _proved(
    stages: Sequence[Tightening], network: nn.Module, x: Tensor, labels: Tensor, epsilon: float
) -> Tensor:
    """Whether the stages, one after the other, prove an image: what all verifiers have in common.

    Images that are misclassified as they are, are left out.
    """
    x = as_network(x, network)
    check_images(x)
    logits = applied(network, x)
    check_labels(labels, logits.shape)
    correct = (logits.argmax(1) == labels).nonzero().squeeze(1)
    proved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    exact = in_float64(network)
    # One image tells the sizes, and whether all layers have rules, however easy the images are.
    trace = tuple(enclosures(exact, ball(x[:1].double(), epsilon)))
    crown_margins(trace, labels[:1])

    for images in torch.split(correct, rows_at_once(trace)):
        problem = Problem.of(exact, ball(x[images].double(), epsilon), labels[images])
        proved[images] = problem.proved
        for stage in stages:
            images, problem = images[~problem.proved], problem.only(~problem.proved)
            if len(images) == 0:
                break
            problem = stage(problem)
            proved[images] = problem.proved
    return proved


def crown_ibp(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Linear relaxation on top of interval bounds: the cheapest.

    Args, returns and errors, of the verifiers below too, are those of
    :func:`robust_app.certificates.certified`; a layer without a rule of
    :func:`~robust_app.pullback.pull_back` is an ``UnsupportedLayer`` too.
    """
    return _proved((relax,), network, x, labels, epsilon)


def alpha_crown_ibp(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``crown_ibp``, then optimised slopes."""
    return _proved((relax, optimize), network, x, labels, epsilon)


def crown(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``crown_ibp``, then linear relaxation for the bounds of the hidden layers too."""
    return _proved((relax, tighten, relax), network, x, labels, epsilon)


def alpha_crown(network: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """``alpha_crown_ibp``, then ``crown`` and its slopes optimised: the tightest."""
    return _proved(TIGHTEST, network, x, labels, epsilon)
