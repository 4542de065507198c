"""The examples run, draw their pictures, and their page shows what they print."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_app import data
from robust_app.bounds import propagate
from robust_app.interval import Interval

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("oscillator", "two_digits", "own_layer")


def load(name):
    specification = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def oscillator():
    return load("oscillator")


@pytest.fixture(scope="module")
def two_digits():
    return load("two_digits")


@pytest.fixture(scope="module")
def own_layer():
    return load("own_layer")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def first_column(table):
    """What the rows of a Markdown table are about."""
    return re.findall(r"^\| (.+?) \|", table, re.MULTILINE)


def shown(printed, page):
    """Whether a page has a table with the heading and the rows of the printed one."""
    heading, *rows = printed.splitlines()
    return heading in page and first_column("\n".join(rows)) == first_column(
        page[page.index(heading) + len(heading) :].partition("\n\n")[0]
    )


def test_every_example_is_on_the_page_with_its_picture():
    page = (DOCS / "examples.md").read_text(encoding="utf-8")
    scripts = sorted(file.stem for file in (DOCS / "examples").glob("*.py"))
    assert scripts == sorted([*NAMES, "two_losses"])
    for name in scripts:
        assert f"python docs/examples/{name}.py" in page
        assert f"](figures/{name.replace('_', '-')}.svg)" in page


@pytest.mark.parametrize(
    ("name", "shortened"),
    [("oscillator", {"steps": 2}), ("two_digits", {"steps": 2}), ("own_layer", {"epochs": 1})],
)
def test_a_shortened_example_prints_the_page_s_table_and_draws(name, shortened, tmp_path, capsys):
    load(name).main(tmp_path, **shortened)
    page = (DOCS / "examples.md").read_text(encoding="utf-8")
    assert shown(capsys.readouterr().out.strip(), page)
    (picture,) = tmp_path.iterdir()
    assert (DOCS / "figures" / picture.name).exists()
    assert picture.read_text(encoding="utf-8").rstrip().endswith("</svg>")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_as_it_is(name, tmp_path, capsys):
    load(name).main(tmp_path)
    printed = capsys.readouterr().out
    assert shown(printed.strip(), (DOCS / "examples.md").read_text(encoding="utf-8"))
    assert "nan" not in printed
    assert len(list(tmp_path.glob("*.svg"))) == 1


def test_the_stated_solution_solves_the_stated_equation(oscillator):
    class Solution(nn.Module):
        def forward(self, t):
            return oscillator.truth(t)

    t = torch.linspace(0, 2, 21, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(oscillator.residual(Solution(), t), torch.zeros_like(t))
    start = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    value = oscillator.truth(start)
    (velocity,) = torch.autograd.grad(value, start)
    assert (value.item(), velocity.item()) == pytest.approx((1.0, 0.0))


def test_the_data_go_first_until_the_misfit_is_that_of_the_noise(oscillator):
    square = oscillator.NOISE**2
    answers = [
        int(oscillator.UNTIL_FITTED(torch.tensor([misfit, 5.0])))
        for misfit in (2 * square, 0.5 * square)
    ]
    assert answers == [0, 1]


def test_the_curve_of_the_data_alone_passes_nearer_to_them(oscillator):
    misfits = [
        oscillator.errors(oscillator.fit(oscillator.WAYS["data alone"], seed=0, steps=steps), 0)[0]
        for steps in (1, 100)
    ]
    assert misfits[1] < misfits[0] / 2


def test_two_digits_overlap_in_the_middle(two_digits):
    left, right = torch.rand(2, 3, 1, 8, 8)
    both = two_digits.side_by_side(left, right)
    assert both.shape == (3, 1, 8, 12)
    assert torch.equal(both[..., :4], left[..., :4])
    assert torch.equal(both[..., 8:], right[..., 4:])
    assert torch.equal(both[..., 4:8], torch.maximum(left[..., 4:], right[..., :4]))


def test_the_classes_are_of_the_digits_in_the_image(two_digits, digits):
    x = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    images, (left, right) = two_digits.pairs(x, torch.arange(10), 50, generator)
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), left)
    assert torch.equal((images[:, 0, 0, -1] * 255).round().long(), right)


def test_bounds_of_the_own_layer_hold_and_are_met(own_layer):
    layer, box = own_layer.MaxMin(), Interval(torch.randn(50, 6), torch.rand(50, 6))
    out = propagate(layer, box)
    for _ in range(50):
        inside = layer(box.center + box.radius * (2 * torch.rand(50, 6) - 1))
        assert (inside >= out.lower - 1e-6).all()
        assert (inside <= out.upper + 1e-6).all()
    torch.testing.assert_close(layer(box.lower), out.lower)
    torch.testing.assert_close(layer(box.upper), out.upper)


def test_the_own_layer_sorts_pairs(own_layer):
    x = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    assert own_layer.MaxMin()(x).tolist() == [[2.0, 1.0, 4.0, 3.0]]
