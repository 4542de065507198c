"""Two digits in one image, two classifiers on one trunk: the least of multi-task problems.

python docs/examples/two_digits.py  # a table, and docs/figures/two-digits.svg
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mogd import BisectorProjection, Constant, Fixed, Priority, Rule, UnbiasedMultiGradient
from robust_app import data

FIGURES = Path(__file__).parents[1] / "figures"

OVERLAP = 4  # columns that both digits share
STEPS, BATCH, TEST_PAIRS, SEEDS = 600, 64, 4000, range(3)

Way = tuple[Rule, Priority]
PAPER = BisectorProjection(regularization=0.0)
ALONE: dict[str, Way] = {
    "left alone": (Constant((1.0, 0.0)), Fixed(0)),
    "right alone": (Constant((0.0, 1.0)), Fixed(0)),
}
JOINT: dict[str, Way] = {
    "weighted sum 1 : 1": (Constant((1.0, 1.0)), Fixed(0)),
    "mogd, left first": (PAPER, Fixed(0)),
    "mogd, larger loss first": (PAPER, lambda losses: losses.argmax()),
}


class TwoHeads(nn.Module):
    """A trunk that both losses share, and a head for each: images to two rows of logits."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU())
        self.left, self.right = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the left and of the right digit, ``(batch, 10)`` each."""
        features = self.trunk(x)
        return self.left(features), self.right(features)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Images ``(batch, 1, H, W)`` of one size in one, where they overlap the brighter pixel."""
    beyond = left.shape[-1] - OVERLAP
    return torch.maximum(F.pad(left, (0, beyond)), F.pad(right, (beyond, 0)))


def pairs(
    x: Tensor, y: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Images of two digits drawn at random, and the classes of the left and the right one."""
    left, right = torch.randint(len(x), (2, count), generator=generator)
    return side_by_side(x[left] / 255, x[right] / 255), (y[left], y[right])


def losses(network: TwoHeads, images: Tensor, labels: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Cross entropy of the left and of the right digit."""
    return [F.cross_entropy(z, y) for z, y in zip(network(images), labels, strict=True)]


def train(way: Way, digits: data.Dataset, seed: int, steps: int = STEPS) -> TwoHeads:
    """A network trained on pairs of training images."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    _, height, width = digits.image_shape
    network = TwoHeads(height * (2 * width - OVERLAP))
    rule, priority = way
    optimizer = UnbiasedMultiGradient(
        network.parameters(),
        torch.optim.Adam,
        rule=rule,
        priority=priority,
        weigh_by=network.trunk.parameters(),  # what the losses compete for
        lr=3e-3,
    )
    for _ in range(steps):
        images, labels = pairs(digits.x_train, digits.y_train, BATCH, generator)
        optimizer.zero_grad()
        optimizer.backward(losses(network, images, labels))
        optimizer.step()
    return network


@torch.no_grad()
def errors(network: TwoHeads, digits: data.Dataset) -> Tensor:
    """Share of misclassified left and right digits, of the same pairs of test images: ``(2,)``."""
    generator = torch.Generator().manual_seed(2**31)
    images, labels = pairs(digits.x_test, digits.y_test, TEST_PAIRS, generator)
    answers = zip(network(images), labels, strict=True)
    wrong = [(logits.argmax(1) != classes).float().mean() for logits, classes in answers]
    return torch.stack(wrong)


def table(found: Mapping[str, Tensor]) -> str:
    """Errors ``(seeds, 2)`` of each way: means ± standard deviations."""
    lines = ["| weights | left, error | right, error |", "|---|---:|---:|"]
    for name, of_seeds in found.items():
        both = zip(100 * of_seeds.mean(0), 100 * of_seeds.std(0), strict=True)
        lines.append(f"| {name} | {' | '.join(f'{m:.1f} ± {s:.1f} %' for m, s in both)} |")
    return "\n".join(lines)


def draw(file: Path, digits: data.Dataset, found: Mapping[str, Tensor]) -> None:
    """Some images, and the two errors of every trained network, as an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Neither dates nor random identifiers: the same numbers give the same file.
    pyplot.rcParams.update({"svg.hashsalt": "two digits", "font.size": 9})
    figure, (shown, plane) = pyplot.subplots(
        1, 2, figsize=(7.2, 3.2), layout="constrained", width_ratios=(1, 1.4)
    )
    generator = torch.Generator().manual_seed(0)
    images, labels = pairs(digits.x_test, digits.y_test, 8, generator)
    rows = F.pad(images, (1, 1, 1, 1), value=1.0).view(4, 2, *[s + 2 for s in images.shape[-2:]])
    mosaic = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    shown.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=1)
    named = [f"{left}{right}" for left, right in zip(*(y.tolist() for y in labels), strict=True)]
    shown.set(title=", ".join(named), xticks=[], yticks=[])
    alone = {"color": "tab:gray", "linewidth": 0.8, "label": "each digit alone"}
    plane.axvline(100 * found["left alone"][:, 0].mean(), **alone)
    plane.axhline(100 * found["right alone"][:, 1].mean(), **alone | {"label": None})
    for name, marker in zip(JOINT, "so^", strict=True):
        left, right = 100 * found[name].T
        plane.plot(left, right, marker, alpha=0.7, label=name)
    plane.set(xlabel="error of the left digit, %", ylabel="error of the right digit, %")
    plane.set(xlim=(0, None), ylim=(0, None))
    plane.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main(figures: Path = FIGURES, steps: int = STEPS) -> None:
    """Train, print the table and draw the picture."""
    digits = data.load("digits")
    found = {
        name: torch.stack([errors(train(way, digits, seed, steps), digits) for seed in SEEDS])
        for name, way in (ALONE | JOINT).items()
    }
    print(table(found))
    draw(figures / "two-digits.svg", digits, found)


if __name__ == "__main__":
    main()
