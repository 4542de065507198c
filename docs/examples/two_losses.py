"""Two noisy quadratic losses of two parameters: the paths of four ways to weigh their gradients.

python docs/examples/two_losses.py          # draws three in docs/figures/two-losses.svg, seed 0
python docs/examples/two_losses.py --table  # prints the means over 200 seeds
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mogd import BisectorProjection, UnbiasedMultiGradient

FIGURES = Path(__file__).parents[1] / "figures"

# L_k(θ) = ½ (θ - c_k)ᵀ H_k (θ - c_k); a batch's gradient is the true one plus N(0, σ² I).
CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
START = torch.tensor([-1.5, 2.0], dtype=torch.float64)
NOISE, STEP_SIZE, STEPS = 1.0, 0.05, 300


def hessian(eigenvalues: tuple[float, float], degrees: float) -> Tensor:
    """A symmetric matrix by its eigenvalues and the direction of the first eigenvector."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    axes = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return axes @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ axes.T


HESSIANS = torch.stack([hessian((1.0, 4.0), 0.0), hessian((1.0, 10.0), 60.0)])


def losses(point: Tensor) -> Tensor:
    """Both losses without noise, at points ``(..., 2)``: ``(..., 2)``."""
    offset = point.unsqueeze(-2) - CENTRES
    return 0.5 * torch.einsum("...ki,kij,...kj->...k", offset, HESSIANS, offset)


def gradients(point: Tensor) -> Tensor:
    """The gradients without noise, a row for each loss."""
    rows: Tensor = torch.einsum("kij,kj->ki", HESSIANS, point - CENTRES)
    return rows


def pareto_set(count: int = 2001) -> Tensor:
    """Minimisers of λL₁ + (1 - λ)L₂ for λ from 0 to 1: ``(count, 2)``."""
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    weights = torch.stack([share, 1 - share], dim=1)
    pulls = torch.einsum("kij,kj->ki", HESSIANS, CENTRES)
    curvatures = torch.einsum("nk,kij->nij", weights, HESSIANS)
    front: Tensor = torch.linalg.solve(curvatures, weights @ pulls)
    return front


def weighted_sum(gradients: Tensor) -> Tensor:
    """The mean of the losses."""
    return torch.full_like(gradients[:, 0], 0.5)


def pcgrad(gradients: Tensor) -> Tensor:
    """Each gradient projected off the other where they disagree, then the mean (Yu et al.)."""
    gramian = gradients @ gradients.T
    overlap = gramian[0, 1].clamp(max=0.0)
    return 0.5 * (1.0 - overlap / gramian.diagonal())


def same_batch(gradients: Tensor) -> Tensor:
    """The paper's rule, fed with the batch's own gradients instead of past ones."""
    norms = torch.linalg.vector_norm(gradients, dim=1)
    return BisectorProjection()(gradients @ gradients.T, norms, torch.tensor(0)).weights


def path(weigh: Callable[[Tensor], Tensor], noise: Tensor) -> Tensor:
    """The points visited with weights from the batch's gradients: ``(STEPS + 1, 2)``."""
    points = [START]
    for of_batch in noise:
        batch = gradients(points[-1]) + of_batch
        points.append(points[-1] - STEP_SIZE * weigh(batch) @ batch)
    return torch.stack(points)


def mogd_path(noise: Tensor) -> Tensor:
    """The points visited with weights from past gradients, all options at their defaults."""
    point = START.clone().requires_grad_()
    optimizer = UnbiasedMultiGradient([point], lr=STEP_SIZE)
    points = [START]
    for of_batch in noise:
        optimizer.zero_grad()
        optimizer.backward(losses(point) + of_batch @ point)  # the gradient of n·θ is n
        optimizer.step()
        points.append(point.detach().clone())
    return torch.stack(points)


def draw_noise(seed: int) -> Tensor:
    """What is added to the two gradients at each step: ``(STEPS, 2, 2)``."""
    generator = torch.Generator().manual_seed(seed)
    return NOISE * torch.randn(STEPS, 2, 2, generator=generator, dtype=torch.float64)


ABLATION = "paper's rule, this batch"  # in the table only

METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "weighted sum (½, ½)": lambda noise: path(weighted_sum, noise),
    "PCGrad, this batch": lambda noise: path(pcgrad, noise),
    ABLATION: lambda noise: path(same_batch, noise),
    "mogd, past batches": mogd_path,
}


def table(seeds: int) -> str:
    """Mean ± standard error over seeds, at the last point of each path."""
    front = pareto_set()
    lines = ["| weights | distance to the Pareto set | L₁ | L₂ |", "|---|---:|---:|---:|"]
    for name, run in METHODS.items():
        ends = torch.stack([run(draw_noise(seed))[-1] for seed in range(seeds)])
        distance = torch.cdist(ends, front).amin(1, keepdim=True)
        values = torch.cat([distance, losses(ends)], dim=1)
        errors = values.std(0) / seeds**0.5
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(values.mean(0), errors, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path, seed: int) -> None:
    """The paths of three methods on one noise sequence, a panel each, as an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    # Neither dates nor random identifiers: the same seed gives the same file.
    pyplot.rcParams.update({"svg.hashsalt": "two losses", "font.size": 9})
    x, y = torch.meshgrid(
        torch.linspace(-2.4, 2.0, 90), torch.linspace(-1.2, 2.4, 90), indexing="ij"
    )
    heights = losses(torch.stack([x, y], dim=-1).double())
    front, noise = pareto_set(), draw_noise(seed)
    names = [name for name in METHODS if name != ABLATION]
    figure, panels = pyplot.subplots(1, 3, figsize=(9.6, 3.4), sharey=True, layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        for k, colour in enumerate(("tab:blue", "tab:red")):
            levels = (0.1, 0.5, 1.5, 4.0, 8.0)
            panel.contour(x, y, heights[..., k], levels, colors=colour, alpha=0.35, linewidths=0.8)
            panel.plot(*CENTRES[k], marker="*", color=colour, markersize=10, linestyle="none")
        (drawn_front,) = panel.plot(*front.T, color="black", linewidth=2.5)
        (drawn_path,) = panel.plot(*METHODS[name](noise).T, color="tab:green", linewidth=0.9)
        panel.plot(*START, marker="o", color="tab:green", markersize=5)
        panel.set(title=name, aspect="equal", xlabel="θ₁", xlim=(-2.4, 2.0), ylim=(-1.2, 2.4))
    panels[0].set_ylabel("θ₂")
    minima = [
        Line2D([], [], marker="*", markersize=10, color=colour)
        for colour in ("tab:blue", "tab:red")
    ]
    figure.legend(
        [drawn_path, drawn_front, *minima],
        ["path", "Pareto set", "contours and minimum of L₁", "contours and minimum of L₂"],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Draw the figure or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print means over seeds instead")
    parser.add_argument("--seeds", type=int, default=200, help="of the table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.seeds))
    else:
        draw(FIGURES / "two-losses.svg", seed=0)


if __name__ == "__main__":
    main()
