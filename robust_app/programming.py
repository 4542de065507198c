"""Mixed-integer linear programs, built piece by piece and solved by HiGHS through SciPy."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robust_app.errors import UserError

_INFEASIBLE = 2  # a status of scipy.optimize.milp
SMALL = 1e-9
"""The solver drops coefficients up to this size: they are allowed for."""

TOLERANCE = 1e-6
"""What the solver lets pass as 0 in a row whose largest coefficient is near 1."""

_ANY_GAP = 1e30  # between the costs of a solution and of the best one

_THREAD = "solver of mixed-integer programs"


class Answer(NamedTuple):
    """What the solver found out.

    Attributes:
        infeasible: it is proved that there is no solution.
        solution: values of all variables, float64 ``(variables,)``, if there are any.
    """

    infeasible: bool
    solution: Tensor | None


class Program:
    """Variables between bounds and linear constraints, in float64.

    The solver's tolerances are absolute: it is given variables and rows divided by powers of two,
    so that the largest bound of each and the largest coefficient of each are between ½ and 1.

    Raises:
        UserError: SciPy is not installed.

    >>> program = Program()
    >>> x = program.variables(torch.tensor([0.0]), torch.tensor([2.0]), integer=True)
    >>> program.constrain([(torch.tensor([[2.0]]), x)], torch.tensor([1.0]), torch.tensor([9.0]))
    >>> program.minimum_below(x, torch.tensor([1.0]), limit=5.0, seconds=10.0).solution
    tensor([1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        try:
            self._optimize: Any = import_module("scipy.optimize")
            self._sparse: Any = import_module("scipy.sparse")
        except ImportError as error:
            raise UserError("the verifier exact needs SciPy: pip install scipy") from error
        self._scales: list[Tensor] = []  # what the variables were divided by
        self._lower: list[Tensor] = []
        self._upper: list[Tensor] = []
        self._integer: list[Tensor] = []
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []  # row, column, value
        self._lower_sides: list[Tensor] = []
        self._upper_sides: list[Tensor] = []

    def variables(self, lower: Tensor, upper: Tensor, *, integer: bool = False) -> Tensor:
        """Add variables between bounds ``(n,)``.

        Returns:
            Their indices, int64 ``(n,)``.
        """
        first = sum(map(len, self._lower))
        largest = torch.maximum(lower.abs(), upper.abs()).double()
        scales = torch.ones_like(largest) if integer else _power_of_two(largest)
        self._scales.append(scales)
        self._lower.append(lower / scales)
        self._upper.append(upper / scales)
        self._integer.append(torch.full(lower.shape, integer))
        return torch.arange(first, first + len(lower))

    def constrain(
        self, terms: Sequence[tuple[Tensor, Tensor]], lower: Tensor, upper: Tensor
    ) -> None:
        """Add constraints ``lower <= sum of matrix @ variables <= upper``.

        Args:
            terms: matrices ``(rows, n)``, or diagonals of square ones ``(n,)``, each with the
                indices ``(n,)`` of its variables.
            lower: ``(rows,)``; -inf for none.
            upper: ``(rows,)``; inf for none.
        """
        rows = sum(map(len, self._lower_sides))
        row, column, value = [], [], []
        for matrix, indices in terms:
            entries = (
                (torch.arange(len(matrix)),) * 2
                if matrix.ndim == 1
                else matrix.nonzero(as_tuple=True)
            )
            row.append(entries[0] + rows)
            column.append(indices[entries[1]])
            value.append(matrix[entries] if matrix.ndim == 2 else matrix)
        places, variables, values = torch.cat(row), torch.cat(column), torch.cat(value)
        values = values * torch.cat(self._scales)[variables]
        places = places - rows
        largest = torch.zeros(len(lower), dtype=values.dtype)
        scales = _power_of_two(largest.scatter_reduce(0, places, values.abs(), "amax"))
        values = values / scales[places]
        kept, dropped = self._split(variables, values)
        slack = torch.zeros_like(scales).index_add(0, places, dropped)
        self._entries.append((places[kept] + rows, variables[kept], values[kept]))
        self._lower_sides.append(lower / scales - slack)
        self._upper_sides.append(upper / scales + slack)

    def _split(self, variables: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Which coefficients the solver takes, and how much each of the others could add."""
        kept = values.abs() > SMALL
        lower, upper = torch.cat(self._lower), torch.cat(self._upper)
        largest = torch.maximum(lower.abs(), upper.abs())[variables]
        return kept, torch.where(kept, 0, values.abs() * largest)

    def minimum_below(self, indices: Tensor, costs: Tensor, limit: float, seconds: float) -> Answer:
        """Look for a solution with ``<costs, variables> <= limit``, the costs guiding the search.

        The first solution ends the search: it need not be the minimum.

        Args:
            indices: of the variables with costs, ``(n,)``.
            costs: ``(n,)``.
            limit: of the costs.
            seconds: after which the search is given up.
        """
        if seconds <= 0:
            return Answer(infeasible=False, solution=None)
        lower, upper = torch.cat(self._lower), torch.cat(self._upper)
        scales = torch.cat(self._scales)
        costs = costs * scales[indices]
        scale = _power_of_two(costs.abs().amax())
        costs = costs / scale
        kept, dropped = self._split(indices, costs)
        limit = limit / scale.item() + dropped.sum().item() + TOLERANCE
        objective = torch.zeros(len(lower), dtype=torch.float64)
        objective[indices] = torch.where(kept, costs, 0)
        constraints = [self._optimize.LinearConstraint(objective.numpy()[None], -torch.inf, limit)]
        if self._entries:
            row, column, value = (torch.cat(parts) for parts in zip(*self._entries, strict=True))
            sides = torch.cat(self._lower_sides), torch.cat(self._upper_sides)
            matrix = self._sparse.csr_array(
                (value.double().numpy(), (row.numpy(), column.numpy())),
                shape=(len(sides[0]), len(lower)),
            )
            constraints.append(
                self._optimize.LinearConstraint(matrix, *(side.double().numpy() for side in sides))
            )
        solve = partial(
            self._optimize.milp,
            objective.numpy(),
            integrality=torch.cat(self._integer).numpy(),
            bounds=self._optimize.Bounds(lower.double().numpy(), upper.double().numpy()),
            constraints=constraints,
            options={"time_limit": seconds, "mip_rel_gap": _ANY_GAP},
        )
        result = _interruptible(solve)
        solution = None if result.x is None else torch.from_numpy(result.x) * scales
        return Answer(infeasible=result.status == _INFEASIBLE, solution=solution)


def is_solving() -> bool:
    """Whether a solver goes on that an interruption has left; Python's end would wait for it."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _interruptible(solve: Callable[[], Any]) -> Any:
    """What a solver outside of Python returns, which alone would hear no signal until its end.

    An interruption leaves it at once. No daemon: in the thread of one, Python's end may abort.
    """
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(solve())
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=run, name=_THREAD)
    thread.start()
    result = answer.result()
    thread.join()
    return result


def _power_of_two(values: Tensor) -> Tensor:
    """The one above each of them, or near where float64 ends; 1 for 0."""
    exponents = torch.frexp(values).exponent.clamp(-1000, 1000).numpy()
    powers = torch.from_numpy(np.asarray(np.ldexp(1.0, exponents)))  # exact, as torch's need not be
    return torch.where(values == 0, 1.0, powers)
