"""Moments for tests of the rules."""

import math

import torch
from hypothesis import assume
from hypothesis import strategies as st

from mogd import BisectorProjection

exponents = st.integers(-30, 30)


@st.composite
def vectors(draw, n, exponents=exponents):
    """A nonzero vector in float64 of any size between 1e-30 and 1e30."""
    entries = draw(st.lists(st.floats(-1, 1, width=16), min_size=n, max_size=n))
    assume(math.hypot(*entries) > 0.01)
    return torch.tensor(entries, dtype=torch.float64) * 10.0 ** draw(exponents)


def gramian(m):
    return m @ m.T


def norms(m):
    return torch.linalg.vector_norm(m, dim=1)


def cosine(m):
    return float(torch.nn.functional.normalize(m, eps=0.0).prod(0).sum())


RULE = BisectorProjection()


def weigh(m, favoured, v=None, rule=RULE):
    return rule(gramian(m), norms(m) if v is None else v, torch.tensor(favoured))


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)
