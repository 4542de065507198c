"""The problem behind the picture is the one that its caption states."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "two_losses.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("two_losses", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_gradients_are_those_of_the_losses(script):
    for _ in range(5):
        point = torch.randn(2, dtype=torch.float64, requires_grad=True)
        autograd = torch.autograd.functional.jacobian(script.losses, point)
        torch.testing.assert_close(script.gradients(point), autograd)


def test_curvatures_as_stated(script):
    first, second = torch.linalg.eigvalsh(script.HESSIANS)
    torch.testing.assert_close(first, torch.tensor([1.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(second, torch.tensor([1.0, 10.0], dtype=torch.float64))
    along = torch.tensor([0.5, 3**0.5 / 2], dtype=torch.float64)  # 60°
    torch.testing.assert_close(script.HESSIANS[1] @ along, along)


def test_on_the_pareto_set_the_gradients_are_opposite(script):
    front = script.pareto_set(11)
    torch.testing.assert_close(front[[-1, 0]], script.CENTRES)
    for point in front[1:-1]:
        first, second = script.gradients(point)
        assert torch.cosine_similarity(first, second, dim=0) == pytest.approx(-1)


def test_pcgrad_projects_each_off_the_other(script):
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    # (1, 0) off (-1, 1) is (½, ½); (-1, 1) off (1, 0) is (0, 1); their mean is (¼, ¾).
    step = script.pcgrad(gradients) @ gradients
    torch.testing.assert_close(step, torch.tensor([0.25, 0.75], dtype=torch.float64))
    agreeing = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(script.pcgrad(agreeing), script.weighted_sum(agreeing))


def test_mogd_begins_with_the_mean_then_leaves_it(script):
    noise = script.draw_noise(0)[:3]
    ours, mean = script.mogd_path(noise), script.path(script.weighted_sum, noise)
    torch.testing.assert_close(ours[:2], mean[:2])
    assert not torch.allclose(ours[2], mean[2])


def test_without_noise_every_way_comes_to_the_pareto_set(script):
    front = script.pareto_set()
    for name, run in script.METHODS.items():
        end = run(torch.zeros(150, 2, 2, dtype=torch.float64))[-1]
        assert torch.cdist(end[None], front).min() < 0.02, name


def test_the_picture_is_drawn(script, tmp_path):
    script.draw(tmp_path / "two-losses.svg", seed=0)
    drawn = (tmp_path / "two-losses.svg").read_text(encoding="utf-8")
    assert drawn.rstrip().endswith("</svg>")
