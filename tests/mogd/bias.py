"""How far the mean step is from the same weights on the mean gradients, measured.

A weighting κ is unbiased if E[κ₁g₁ + κ₂g₂] = E[κ₁]E[g₁] + E[κ₂]E[g₂]. On a regression of two
targets, over many batches drawn with replacement, the mean gradients are those of the whole data
set, so κ₁(g₁ - E[g₁]) + κ₂(g₂ - E[g₂]) of one batch is a sample of the bias.

    python tests/mogd/bias.py
"""

import copy
from typing import NamedTuple

import torch

from mogd import BisectorProjection, UnbiasedMultiGradient

PARAMETERS, EXAMPLES, BATCH, HISTORY = 4, 256, 4, 50


class Bias(NamedTuple):
    """Of the mean deviation, lengths relative to that of the mean step."""

    size: float
    sampling_error: float
    z: float  # the largest coordinate, in standard errors


class Problem:
    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.x = self.normal(EXAMPLES, PARAMETERS)
        truth = torch.tensor([[2.0, 1, 0, 0], [0, 2, 1, 0]], dtype=torch.float64)
        self.y = self.x @ truth.T + 0.5 * self.normal(EXAMPLES, 2)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def batch(self):
        return torch.randint(EXAMPLES, (BATCH,), generator=self.random)

    def losses(self, theta, rows):
        yield (self.x[rows] @ theta - self.y[rows, 0]).square().mean()
        yield (self.x[rows] @ theta - self.y[rows, 1]).abs().mean()

    def gradients(self, theta, rows):
        losses = self.losses(theta, rows)
        return torch.stack([torch.autograd.grad(loss, theta)[0] for loss in losses])


def deviations(seed, batches):
    """Samples of the bias and of the unbiased step: of past moments, and of the batch's own."""
    problem = Problem(seed)
    theta = torch.zeros(PARAMETERS, dtype=torch.float64, requires_grad=True)
    mean_gradients = problem.gradients(theta, torch.arange(EXAMPLES))
    optimizer = UnbiasedMultiGradient([theta], lr=0.1)
    for _ in range(HISTORY):
        optimizer.backward(problem.losses(theta, problem.batch()))
        optimizer.zero_grad()
    past, own = [], []
    for _ in range(batches):
        rows = problem.batch()
        now = copy.deepcopy(optimizer)
        point = now.param_groups[0]["params"][0]
        weights = now.backward(problem.losses(point, rows)).weights
        past.append((point.grad - weights @ mean_gradients, weights @ mean_gradients))

        gradients = problem.gradients(theta, rows)
        gramian, norms = gradients @ gradients.T, torch.linalg.vector_norm(gradients, dim=1)
        weights = BisectorProjection()(gramian, norms, torch.tensor(0)).weights
        own.append((weights @ (gradients - mean_gradients), weights @ mean_gradients))
    return past, own


def bias(samples):
    deviation, step = (torch.stack(part) for part in zip(*samples, strict=True))
    mean, error = deviation.mean(0), deviation.std(0) / len(deviation) ** 0.5
    length = step.mean(0).norm()
    return Bias(
        float(mean.norm() / length), float(error.norm() / length), float((mean / error).abs().max())
    )


def measure(seed, batches):
    """The bias of weights from past moments, and of the same rule fed with the batch itself."""
    past, own = deviations(seed, batches)
    return bias(past), bias(own)


def main():
    past, own = measure(seed=0, batches=10_000)
    print("| weights from | bias | sampling error | largest z-score |")
    print("|---|---:|---:|---:|")
    for name, found in (("past gradients", past), ("the batch itself", own)):
        print(f"| {name} | {found.size:.1%} | {found.sampling_error:.1%} | {found.z:.1f} |")


if __name__ == "__main__":
    main()
