"""Errors of a table's rows as numbers: over seeds, over stages, and of two methods."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from robust_app.reproduction.measurements import Measurement
from robust_app.reproduction.paper import Row

Measured = Mapping[Row, Sequence[Measurement]]
"""What there is of each row, one a seed."""


def errors_of(found: Iterable[Measurement], network: str, quantity: str) -> list[float]:
    """An error of one network in percent, one a seed that has it."""
    return [m.errors[network][quantity] for m in found if network in m.errors]


def median_error(found: Iterable[Measurement], network: str, quantity: str) -> float | None:
    """The median over the seeds; None if there is none."""
    known = errors_of(found, network, quantity)
    return statistics.median(known) if known else None


def stage_errors(found: Sequence[Measurement]) -> list[float]:
    """The verified error after stage 0, 1, …, up to the last that was evaluated."""
    errors: list[float] = []
    while (error := median_error(found, f"stage-{len(errors)}", "verified")) is not None:
        errors.append(error)
    return errors


def reduction(ours: float, theirs: float) -> float:
    """By how many percent of theirs ours is lower; both at least 0.

    >>> reduction(ours=6.0, theirs=8.0)
    25.0
    """
    return 100 * (theirs - ours) / theirs if theirs > 0 else 0.0


def paired(
    rows: Iterable[Row], measured: Measured, network: str, one: str, other: str
) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Verified errors of two methods, by data set, ε and model, where both are measured."""
    by_method: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        error = median_error(measured.get(row, ()), network, "verified")
        if error is not None:
            by_method.setdefault((row.dataset, row.epsilon, row.model), {})[row.method] = error
    return {
        case: (errors[one], errors[other])
        for case, errors in by_method.items()
        if one in errors and other in errors
    }
