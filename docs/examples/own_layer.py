"""Certified training of a network with a layer of one's own, on the embedded digits.

python docs/examples/own_layer.py  # a table, and docs/figures/own-layer.svg
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mogd import BisectorProjection, Constant, Rule, Threshold, UnbiasedMultiGradient
from robust_app import data
from robust_app.attacks import falsified, fgsm, uniform_start
from robust_app.bounds import propagate
from robust_app.certificates import certified
from robust_app.fosc import Stationarity
from robust_app.interval import Interval
from robust_app.losses import certified_loss
from robust_app.rounding import rounding_error
from robust_app.schedules import smoothed_ramp, step_decay

FIGURES = Path(__file__).parents[1] / "figures"

EPSILON = 0.05  # radius trained at, in pixels of [0, 1]
EPOCHS, RAMP, BATCH, SEED = 30, 12, 64, 0
RADII = (0.0, 0.0125, 0.025, 0.0375, 0.05, 0.0625, 0.075)


class MaxMin(nn.Module):
    """Sorts each pair of neighbouring features, ``(batch, features)`` (Anil et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        """The larger of each pair, then the smaller."""
        pairs = x.view(len(x), -1, 2)
        return torch.stack([pairs.amax(2), pairs.amin(2)], dim=2).flatten(1)


@propagate.register
def _(layer: MaxMin, interval: Interval) -> Interval:
    # Neither output falls when an input grows: the bounds of the inputs give those of the outputs.
    return Interval.between(layer(interval.lower), layer(interval.upper))


@rounding_error.register
def _(layer: MaxMin, box: Interval) -> None:
    """Nothing is rounded: it chooses among its inputs."""
    del layer, box


def build() -> nn.Sequential:
    """From images ``(batch, 1, 8, 8)`` to logits."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 128), MaxMin()),
        *(nn.Linear(128, 64), MaxMin()),
        nn.Linear(64, 10),
    )


def train(rule: Rule, digits: data.Dataset, *, epsilon: float, epochs: int = EPOCHS) -> nn.Module:
    """A network trained on the adversarial and the certified loss, weighed by a rule."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    network, stationarity = build(), Stationarity()
    optimizer = UnbiasedMultiGradient(
        network.parameters(),
        torch.optim.Adam,
        rule=rule,
        priority=Threshold(stationarity, limit=1e-3),  # the paper's oracle, with c_t = c_max
        lr=2e-3,
    )

    def losses(x: Tensor, y: Tensor, radius: float) -> Iterator[Tensor]:
        start = uniform_start(x, generator)
        x_adv = fgsm(network, x, y, radius, start=start, step_size=1.25 * radius)
        stationarity.observe(x, x_adv.requires_grad_(), radius)
        yield F.cross_entropy(network(x_adv), y)
        yield certified_loss(network, Interval.around(x, radius), y)

    batches = len(digits.x_train) // BATCH
    for step in range(epochs * batches):
        t = step / batches * EPOCHS / epochs
        radius = epsilon * smoothed_ramp(t, RAMP)
        for group in optimizer.param_groups:
            group["lr"] = step_decay(t, 2e-3, milestones=(20, 25), factor=0.2)
        chosen = torch.randint(len(digits.x_train), (BATCH,), generator=generator)
        x, y = digits.x_train[chosen] / 255, digits.y_train[chosen]
        optimizer.zero_grad()
        optimizer.backward(losses(x, y, radius))
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
    return network.eval()


def errors(network: nn.Module, digits: data.Dataset, radius: float) -> tuple[float, float]:
    """PGD and verified error at a radius, in percent; at 0 both are the standard error."""
    x, y = digits.x_test / 255, digits.y_test
    generator = torch.Generator().manual_seed(SEED)
    broken = falsified(network, x, y, radius, steps=20, restarts=1, generator=generator)
    unproved = ~certified(network, x, y, radius)
    return 100 * broken.float().mean().item(), 100 * unproved.float().mean().item()


def table(found: Mapping[str, Mapping[float, tuple[float, float]]]) -> str:
    """Errors at the radius trained at, for each network."""
    lines = ["| network | standard | PGD | verified |", "|---|---:|---:|---:|"]
    for name, at in found.items():
        standard, (pgd, verified) = at[0.0][0], at[EPSILON]
        lines.append(f"| {name} | {standard:.1f} % | {pgd:.1f} % | {verified:.1f} % |")
    return "\n".join(lines)


def draw(file: Path, found: Mapping[str, Mapping[float, tuple[float, float]]]) -> None:
    """PGD and verified error over the radius, as an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Neither dates nor random identifiers: the same numbers give the same file.
    pyplot.rcParams.update({"svg.hashsalt": "own layer", "font.size": 9})
    figure, panel = pyplot.subplots(figsize=(6.0, 3.4), layout="constrained")
    colours = ("tab:gray", "tab:blue", "tab:green")
    for (name, at), colour in zip(found.items(), colours, strict=True):
        pgd, verified = zip(*at.values(), strict=True)
        panel.plot(list(at), verified, color=colour, label=f"{name}: verified")
        panel.plot(list(at), pgd, "--", color=colour, label=f"{name}: PGD")
    panel.axvline(EPSILON, color="black", linewidth=0.5)
    panel.set(xlabel="ε, in pixels of [0, 1]", ylabel="error on 360 test images, %", ylim=(0, 102))
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main(figures: Path = FIGURES, epochs: int = EPOCHS) -> None:
    """Train three networks, print the table and draw the picture."""
    digits = data.load("digits")
    networks = {
        "at ε = 0": train(Constant((1.0, 0.0)), digits, epsilon=0.0, epochs=epochs),
        "weighted sum 1 : 1": train(Constant((1.0, 1.0)), digits, epsilon=EPSILON, epochs=epochs),
        "mogd": train(BisectorProjection(), digits, epsilon=EPSILON, epochs=epochs),
    }
    found = {
        name: {radius: errors(network, digits, radius) for radius in RADII}
        for name, network in networks.items()
    }
    print(table(found))
    draw(figures / "own-layer.svg", found)


if __name__ == "__main__":
    main()
