import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mogd.elimination import solve


def cosines(rows):
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (unit @ unit.T).fill_diagonal_(1.0)


def test_a_system_has_the_solution_computed_by_hand():
    # y₁ + y₂/2 = 4 and y₁/2 + y₂ = 5
    system = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    assert_close(
        solve(system, torch.tensor([4.0, 5.0]).double()), torch.tensor([2.0, 4.0]).double()
    )


@settings(max_examples=60)
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_a_regular_system_has_the_solution_of_torch(size, seed):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, size + 3, generator=random, dtype=torch.float64)
    assume(torch.linalg.eigvalsh(cosines(rows))[0] > 0.02)
    right = torch.randn(size, generator=random, dtype=torch.float64)
    expected = torch.linalg.solve(cosines(rows), right)
    assert_close(solve(cosines(rows), right), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_of_dependent_vectors_a_part_carries_a_bounded_solution(rank, more, seed):
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 8, generator=random, dtype=torch.float64)
    rows = torch.randn(rank + more, rank, generator=random, dtype=torch.float64) @ basis
    unit = torch.nn.functional.normalize(rows, dim=1)
    vector = torch.nn.functional.normalize(torch.randn(8, generator=random).double(), dim=0)
    solution = solve(cosines(rows), unit @ vector)
    assert int(solution.count_nonzero()) <= rank
    left = vector - solution @ unit  # the projection onto the complement of the span
    assert (unit @ left).abs().max() <= 0.1
    assert left.norm() <= 1 + 1e-9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_of_parallel_vectors_the_first_carries_the_solution(sign):
    system = torch.tensor([[1.0, sign], [sign, 1.0]])
    assert solve(system, torch.tensor([3.0, 3.0 * sign])).tolist() == [3.0, 0.0]
