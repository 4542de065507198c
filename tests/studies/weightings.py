"""Weightings of another library through mogd's moments: what becomes of their bias.

    python -m tests.studies.weightings

Three quadratic losses, each gradient with noise of its own, one point, and a history of 50 steps
that is held fixed. TorchJD's weightings get the Gramian of the batch's gradients, as its
aggregators do, or that of mogd's moments. The mean gradients are known, so what a step's noise
leaves in the mean of Σₖ κₖ (gₖ - E[gₖ]) is the bias.
"""

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mogd import UnbiasedMultiGradient
from tests.mogd.bias import Bias
from tests.mogd.bias import bias as of_samples
from tests.studies.variations import OwnBatch

HISTORY, NOISE = 50, 1.0
MINIMA = torch.tensor([[2.0, 0, 0, 1], [-1, 2, 0, 1], [-1, -1, 1, 1]], dtype=torch.float64)
CURVATURES = torch.tensor([[1.0, 2, 1, 1], [2, 1, 1, 2], [1, 1, 3, 1]], dtype=torch.float64)


def losses(theta: Tensor, noise: Tensor) -> Iterator[Tensor]:
    """½ (θ - aₖ)ᵀ Hₖ (θ - aₖ) + ⟨ξₖ, θ⟩, whose gradient has the noise ξₖ."""
    for minimum, curvature, xi in zip(MINIMA, CURVATURES, noise, strict=True):
        yield 0.5 * (curvature * (theta - minimum).square()).sum() + xi @ theta


def bias(
    weighting: Callable[[Tensor], Tensor],
    optimizer_class: type[UnbiasedMultiGradient],
    batches: int,
    seed: int = 0,
) -> Bias:
    """The bias of steps from one point, whose weights are a function of a Gramian.

    Args:
        weighting: from a Gramian, shape ``(3, 3)``, to weights, shape ``(3,)``.
        optimizer_class: what decides whose Gramian it gets.
        batches: how many steps are tried.
        seed: of the noise, and of a weighting that draws.
    """
    torch.manual_seed(seed)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    exact = torch.stack([torch.autograd.grad(loss, theta)[0] for loss in losses(theta, 0 * MINIMA)])
    optimizer = optimizer_class([theta], lr=0.1, rule=weighting)
    for _ in range(HISTORY):
        optimizer.backward(losses(theta, NOISE * torch.randn_like(MINIMA)))
        optimizer.zero_grad()
    samples = []
    for _ in range(batches):
        now = copy.deepcopy(optimizer)
        point = now.param_groups[0]["params"][0]
        step = now.backward(losses(point, NOISE * torch.randn_like(MINIMA))).weights @ exact
        samples.append((point.grad - step, step))
    return of_samples(samples)


def weightings() -> Mapping[str, Callable[[Tensor], Tensor]]:
    """TorchJD's, by the name of their method."""
    from torchjd import aggregation  # only the development group has it

    return {
        name: getattr(aggregation, f"{name}Weighting")() for name in ("UPGrad", "MGDA", "PCGrad")
    }


def main() -> None:
    """Print the table."""
    print("| weighting | Gramian of | bias | sampling error | largest z-score |")
    print("|---|---|---:|---:|---:|")
    for name, weighting in weightings().items():
        for of, optimizer in (("past gradients", UnbiasedMultiGradient), ("the batch", OwnBatch)):
            found = bias(weighting, optimizer, batches=10_000)
            print(
                f"| {name} | {of} | {found.size:.1%} | {found.sampling_error:.1%} | {found.z:.1f} |"
            )


if __name__ == "__main__":
    main()
