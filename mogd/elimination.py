"""Small systems of inner products solved where they are, without waiting for a GPU."""

import torch
from torch import Tensor

# Below this squared sine, an angle of 6°, a moment is taken to lie in the span of those before it.
# To tell them apart would take large weights of both signs, which noise does not bear.
DEPENDENT = 1e-2


def solve(cosines: Tensor, right: Tensor) -> Tensor:
    """y with R y = r for the cosines R between K vectors, by Gauss-Jordan elimination.

    A vector whose squared sine to the span of those before it is below 0.01 gets 0: of vectors that
    nearly depend on each other the first ones carry the solution, and it stays bounded.

    Args:
        cosines: R, symmetric positive semidefinite with ones on the diagonal, shape ``(K, K)``.
        right: r, inner products of one vector with these, shape ``(K,)``.

    Returns:
        y, shape ``(K,)``.

    >>> solve(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([1.0, 2.0]))
    tensor([0., 2.])
    """
    system = torch.cat([cosines, right[:, None]], dim=1)
    rows = torch.arange(len(right), device=right.device)[:, None]
    for index in range(len(right)):
        pivot = system[index, index]  # sin² of the angle to the span of the vectors before
        row = torch.where(pivot > DEPENDENT, system[index] / pivot, 0.0)
        system = torch.where(rows == index, row, system - system[:, index, None] * row)
    return system[:, -1]
