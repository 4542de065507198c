"""The authors' weights, by hand (NOTES: what their code does where it differs)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogd import BisectorProjection
from robust_app.authors import AuthorsWeights

FIRST, SECOND = torch.tensor(0), torch.tensor(1)


def moments(length: float, other: float, product: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gramian and norms of two moments that are as long as their norms' averages."""
    gramian = torch.tensor([[length**2, product], [product, other**2]], dtype=torch.float64)
    return gramian, torch.tensor([length, other], dtype=torch.float64)


def test_in_agreement_by_hand():
    """v = (2, 4), ⟨m₁, m₂⟩ = 4: d = m₁/2 + m₂/4 has ⟨m₁, d⟩ = 3, ⟨m₂, d⟩ = 6, ‖d‖² = 3; γ = 3/2.

    The paper's κ is (γ/v₁, γ/v₂) = (3/4, 3/8), theirs (γ, γ v₁/v₂) = (3/2, 3/4).
    """
    gramian, norms = moments(2, 4, product=4)
    for favoured in (FIRST, SECOND):
        found = AuthorsWeights()(gramian, norms, favoured)
        assert found.weights.tolist() == pytest.approx([1.5, 0.75])
        assert found.regularization.tolist() == [0, 0]
    assert BisectorProjection()(gramian, norms, FIRST).weights.tolist() == [0.75, 0.375]


@pytest.mark.parametrize(
    ("favoured", "weights"),
    # -⟨m₁, m₂⟩/v² is 6/16 for the second and 6/4 for the first.
    [(FIRST, [1.0, 0.375]), (SECOND, [1.5, 1.0])],
)
def test_in_conflict_by_hand(favoured, weights):
    gramian, norms = moments(2, 4, product=-6)
    found = AuthorsWeights(0.25)(gramian, norms, favoured)
    assert found.weights.tolist() == weights
    assert found.regularization.tolist() == [0, 0.25]  # whichever loss is favoured


def test_without_a_gradient_of_the_first_loss_the_second_weighs_as_in_the_paper():
    gramian, norms = torch.tensor([[0.0, 0.0], [0.0, 4.0]]), torch.tensor([0.0, 2.0])
    found = AuthorsWeights()(gramian, norms, SECOND)
    assert found.weights.equal(BisectorProjection()(gramian, norms, SECOND).weights)
    assert found.weights[1] > 0


def test_a_first_loss_without_gradient_leaves_the_papers_weights():
    gramian, norms = moments(0, 3, product=0)
    gramian[0, 1] = gramian[1, 0] = 1e-9  # agreement, as rounding might have it
    found = AuthorsWeights()(gramian, norms, FIRST)
    paper = BisectorProjection()(gramian, norms, FIRST)
    assert torch.equal(found.weights, paper.weights)
    assert found.weights.isfinite().all()


@given(
    st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-1, 1), st.floats(0.01, 100), st.booleans()
)
def test_losses_scaled_alike_scale_the_weights_in_agreement_alone(first, second, cosine, c, which):
    """The paper's weights do not change with the losses' unit; theirs in agreement do."""
    gramian, norms = moments(first, second, first * second * cosine)
    rule, favoured = AuthorsWeights(), SECOND if which else FIRST
    before, after = rule(gramian, norms, favoured), rule(c**2 * gramian, c * norms, favoured)
    # The paper's κ = γ/v scales with 1 / c times c, γ being a length of a unit-free d.
    factor = c if gramian[0, 1] > 0 else 1.0
    torch.testing.assert_close(after.weights, factor * before.weights)
    assert torch.equal(after.regularization, before.regularization)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-1, 1), st.booleans())
def test_the_step_has_the_direction_of_the_papers(first, second, cosine, which):
    gramian, norms = moments(first, second, first * second * cosine)
    favoured = SECOND if which else FIRST
    theirs, paper = (
        rule(gramian, norms, favoured).weights for rule in (AuthorsWeights(), BisectorProjection())
    )
    torch.testing.assert_close(theirs[0] * paper[1], theirs[1] * paper[0])
