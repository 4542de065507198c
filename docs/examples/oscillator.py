"""A damped oscillator from few noisy observations: a data loss against a residual loss.

python docs/examples/oscillator.py             # a table, and docs/figures/oscillator.svg, of seed 0
python docs/examples/oscillator.py --seeds 10  # the table's means over ten seeds
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mogd import (
    BisectorProjection,
    Constant,
    Fixed,
    Priority,
    Rule,
    Threshold,
    UnbiasedMultiGradient,
)

FIGURES = Path(__file__).parents[1] / "figures"

# x″/ω² + 2ζ x′/ω + x = 0, x(0) = 1, x′(0) = 0, for 0 ≤ t ≤ 2; seen at OBSERVATIONS times before 1.
FREQUENCY, DAMPING, END = 2 * math.pi, 0.1, 2.0
OBSERVATIONS, SEEN_UNTIL, NOISE = 12, 1.0, 0.1
STEPS, COLLOCATIONS = 1000, 32

# The data go first until their mean squared misfit is that of the noise, then the equation.
UNTIL_FITTED = Threshold(lambda losses: -losses[0], limit=-(NOISE**2))
PAPER = BisectorProjection(regularization=0.0)

Way = tuple[Rule, Priority]
WAYS: dict[str, Way] = {
    "data alone": (Constant((1.0, 0.0)), Fixed(0)),
    "weighted sum 1 : 0.01": (Constant((1.0, 0.01)), Fixed(0)),
    "weighted sum 1 : 0.1": (Constant((1.0, 0.1)), Fixed(0)),
    "weighted sum 1 : 1": (Constant((1.0, 1.0)), Fixed(0)),
    "weighted sum 1 : 10": (Constant((1.0, 10.0)), Fixed(0)),
    "mogd, data first": (PAPER, Fixed(0)),
    "mogd, residual first": (PAPER, Fixed(1)),
    "mogd, data first until fitted": (PAPER, UNTIL_FITTED),
}

DRAWN = {
    "data alone": "tab:gray",
    "weighted sum 1 : 0.01": "tab:orange",
    "weighted sum 1 : 1": "tab:blue",
    "mogd, data first until fitted": "tab:green",
}


def truth(t: Tensor) -> Tensor:
    """The solution."""
    rate, damped = DAMPING * FREQUENCY, FREQUENCY * math.sqrt(1 - DAMPING**2)
    return torch.exp(-rate * t) * (torch.cos(damped * t) + rate / damped * torch.sin(damped * t))


def residual(network: nn.Module, t: Tensor) -> Tensor:
    """What the equation leaves at times ``t``, ``(n, 1)``, of the network's curve."""
    t = t.detach().requires_grad_()
    x = network(t)
    (velocity,) = torch.autograd.grad(x.sum(), t, create_graph=True)
    (acceleration,) = torch.autograd.grad(velocity.sum(), t, create_graph=True)
    left: Tensor = acceleration / FREQUENCY**2 + 2 * DAMPING * velocity / FREQUENCY + x
    return left


def observe(seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Times and noisy values, ``(n, 1)`` each, and the generator for what is drawn later."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(0.0, SEEN_UNTIL, OBSERVATIONS).unsqueeze(1)
    noise = NOISE * torch.randn(times.shape, generator=generator)
    return times, truth(times) + noise, generator


def fit(way: Way, seed: int, steps: int = STEPS) -> nn.Module:
    """A small network that fits the observations of a seed and the equation."""
    times, values, generator = observe(seed)
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    rule, priority = way
    optimizer = UnbiasedMultiGradient(
        network.parameters(), torch.optim.Adam, rule=rule, priority=priority, lr=5e-3
    )
    for _ in range(steps):
        anywhere = END * torch.rand(COLLOCATIONS, 1, generator=generator)
        data = (network(times) - values).square().mean()
        equation = residual(network, anywhere).square().mean()
        optimizer.zero_grad()
        optimizer.backward([data, equation])
        optimizer.step()
    return network


def errors(network: nn.Module, seed: int) -> Tensor:
    """Root mean squares: of the misfit, of the residual, and of the distance to the solution."""
    times, values, _ = observe(seed)
    everywhere = torch.linspace(0.0, END, 201).unsqueeze(1)
    misfit, remainder = network(times) - values, residual(network, everywhere)
    distance = network(everywhere) - truth(everywhere)
    squares = [error.detach().square().mean() for error in (misfit, remainder, distance)]
    return torch.stack(squares).sqrt()


def table(fitted: Mapping[str, Sequence[nn.Module]]) -> str:
    """Errors of each way, of the networks of the seeds 0, 1, …: means ± standard deviations."""
    lines = ["| weights | misfit | residual | distance to the solution |", "|---|---:|---:|---:|"]
    for name, networks in fitted.items():
        found = torch.stack([errors(network, seed) for seed, network in enumerate(networks)])
        cells = [f"{mean:.3f}" for mean in found.mean(0)]
        if len(networks) > 1:
            cells = [f"{cell} ± {s:.3f}" for cell, s in zip(cells, found.std(0), strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path, fitted: Mapping[str, Sequence[nn.Module]]) -> None:
    """The curves of the first seed, the solution and the observations, as an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Neither dates nor random identifiers: the same numbers give the same file.
    pyplot.rcParams.update({"svg.hashsalt": "oscillator", "font.size": 9})
    figure, panel = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    t = torch.linspace(0.0, END, 101).unsqueeze(1)
    panel.plot(t, truth(t), color="black", linewidth=3, alpha=0.3, label="solution")
    for name, colour in DRAWN.items():
        curve = fitted[name][0](t).detach()
        panel.plot(t, curve, color=colour, linewidth=1.2, label=name)
    times, values, _ = observe(seed=0)
    panel.plot(times, values, "o", color="black", markersize=4, label="observations")
    panel.set(xlabel="t", ylabel="x", ylim=(-1.2, 1.6))
    figure.legend(frameon=False, ncols=3, loc="outside lower center")
    figure.savefig(file, metadata={"Date": None})


def main(figures: Path = FIGURES, seeds: int = 1, steps: int = STEPS) -> None:
    """Fit, print the table and draw the picture."""
    fitted = {name: [fit(way, seed, steps) for seed in range(seeds)] for name, way in WAYS.items()}
    print(table(fitted))
    draw(figures / "oscillator.svg", fitted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    main(seeds=parser.parse_args().seeds)
