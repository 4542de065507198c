import pytest
import torch
from chosen import linear, parameter
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from twin import Twin, inner

from mogd import UnbiasedMultiGradient

decays = st.sampled_from([0.0, 0.5, 0.9, 0.99])


@st.composite
def streams(draw):
    """At each step the gradients of two losses, the value of the second and who is favoured."""
    n = draw(st.integers(2, 5))
    gradient = st.lists(st.integers(-5, 5).map(float), min_size=n, max_size=n)
    step = st.tuples(gradient, gradient, st.floats(-2, 5), st.booleans())
    return draw(st.lists(step, min_size=5, max_size=30))


def clear(twin):
    """Whether the moments agree or conflict beyond rounding, or one of them is zero."""
    m_1, m_2, _, _ = twin.moments()
    product = (inner(m_1, m_1) * inner(m_2, m_2)) ** 0.5
    return product == 0 or abs(inner(m_1, m_2)) > 1e-9 * product


@settings(max_examples=40)
@given(streams(), decays, decays, st.floats(1e-3, 1.0))
def test_the_optimizer_is_the_papers_algorithm(stream, beta_1, beta_2, lr):
    n = len(stream[0][0])
    twin = Twin([1.0] * n, lr, beta_1, beta_2)
    p, favoured = parameter(*[1.0] * n), 0
    optimizer = UnbiasedMultiGradient(
        [p], lr=lr, moment_decay=(beta_1, beta_2), priority=lambda _: favoured
    )
    for g_adv, g_ibp, loss_ibp, abstract_first in stream:
        assume(clear(twin))
        favoured = int(abstract_first)
        kappa_adv, kappa_ibp, kappa_reg = twin.step(g_adv, g_ibp, loss_ibp, abstract_first)
        record = optimizer.backward([linear(p, g_adv), linear(p, g_ibp, loss_ibp)])
        optimizer.step()
        assert_close(record.weights.tolist(), [kappa_adv, kappa_ibp], rtol=1e-7, atol=1e-9)
        assert_close(record.regularization.tolist(), [0.0, kappa_reg], rtol=0, atol=0)
        assert_close(p.tolist(), twin.theta, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("abstract_first", [False, True])
def test_the_optimizer_follows_the_papers_algorithm_for_long(abstract_first):
    torch.manual_seed(0)
    twin = Twin([0.0] * 3, 0.01, 0.9, 0.99)
    p = parameter(0.0, 0.0, 0.0, dtype=torch.float32)
    optimizer = UnbiasedMultiGradient([p], lr=0.01, priority=lambda _: int(abstract_first))
    conflicts = 0
    for gradients in torch.randn(500, 2, 3):
        g_adv, g_ibp = gradients.tolist()
        expected = twin.step(g_adv, g_ibp, 0.25, abstract_first)
        record = optimizer.backward([linear(p, g_adv), linear(p, g_ibp, 0.25)])
        optimizer.step()
        conflicts += int(record.conflict)
        found = [*record.weights.tolist(), float(record.regularization[1])]
        assert_close(found, list(expected), rtol=1e-3, atol=1e-4)
    assert_close(p.tolist(), twin.theta, rtol=1e-4, atol=1e-4)
    assert 100 < conflicts < 400
