"""The paper's figures beside the measured ones, as tables of text."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from robust_app.reproduction.comparison import (
    Measured,
    errors_of,
    median_error,
    paired,
    reduction,
    stage_errors,
)
from robust_app.reproduction.measurements import Measurement
from robust_app.reproduction.paper import QUANTITIES, Row, Table, shown

NETWORKS = {
    "best": "best epoch (by held-out training images)",
    "last": "last epoch",
}
STATISTICS: Mapping[str, Callable[[list[float]], float]] = {
    "best": min,
    "median": statistics.median,
    "worst": max,
}
MISSING, UNFINISHED, UNEVALUATED = "–", "in progress", "not evaluated"


class Sheet(NamedTuple):
    """A table of text.

    Attributes:
        title: above it; tells the sheets of a table apart.
        columns: their heads.
        lines: as many texts each as there are columns.
    """

    title: str
    columns: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def sheets(table: Table, measured: Measured) -> list[Sheet]:
    """All there is to show of a table.

    Args:
        table: with the rows to show.
        measured: of each row, one a seed.
    """
    found = []
    for network in filter(NETWORKS.get, table.networks):
        if "statistics" in table.extras:
            found.append(statistics_sheet(table, measured, network))
            found.append(lower_sheet(table, measured, network))
        found.append(errors_sheet(table, measured, network))
        if "reduction" in table.extras:
            found.append(reduction_sheet(table, measured, network))
    if "stages" in table.networks:
        found.append(stages_sheet(table, measured))
    if "seconds" in table.extras:
        found.append(seconds_sheet(table, measured))
    if "literature" in table.extras:
        found.append(literature_sheet(table))
    return [sheet for sheet in found if sheet.lines]


def unfinished(measured: Measured, reasons: Mapping[str, str]) -> list[str]:
    """A line for every run that rows wait for.

    Args:
        measured: of each row, one a seed.
        reasons: why a run is not finished, by its name, where there is something to say.
    """
    waiting = {m.run: m for found in measured.values() for m in found if m.begun and not m.complete}
    lines = []
    for name, m in waiting.items():
        line = f"{name}: {m.epochs_done} of {m.epochs} epochs"
        line += ", not all evaluated" if m.epochs_done == m.epochs else ""
        lines.append(f"{line} ({reasons[name]})" if name in reasons else line)
    return lines


def runs_sheet(measured: Measured) -> Sheet:
    """The training runs behind the rows, those that are begun."""
    runs = {m.run: m for found in measured.values() for m in found if m.begun}
    lines = [
        (
            name,
            m.recipe,
            str(m.seed),
            f"{m.epochs_done} of {m.epochs}",
            f"{m.seconds:.0f}",
            m.device,
        )
        for name, m in runs.items()
    ]
    return Sheet("runs", ("directory", "recipe", "seed", "epochs", "seconds", "device"), lines)


def errors_sheet(table: Table, measured: Measured, network: str) -> Sheet:
    """Each error of each row, the paper's beside the measured where the paper has any."""
    beside = any(row.figures for row in table.rows)
    columns = ["data set", "ε", "method", "model"]
    for quantity in table.quantities:
        name = QUANTITIES[quantity]
        columns += [f"{name}: paper", "measured"] if beside else [name]
    lines = []
    for row in table.rows:
        cells = [row.dataset, shown(row.epsilon), row.method, row.model]
        for quantity in table.quantities:
            if beside:
                cells.append(percent(row.figures.get(quantity)))
            cells.append(cell(measured.get(row, ()), network, quantity))
        lines.append(tuple(cells))
    return Sheet(f"errors, %, {NETWORKS[network]}", tuple(columns), lines)


def statistics_sheet(table: Table, measured: Measured, network: str) -> Sheet:
    """Smallest, median and largest error over the models."""
    columns = ["data set", "ε", "method", "error"]
    for name in STATISTICS:
        columns += [f"{name}: paper", "measured"]
    lines = []
    for entry in table.extras["statistics"]:
        rows = _matching(table.rows, entry)
        for quantity in table.quantities if rows else ():
            errors = [median_error(measured.get(row, ()), network, quantity) for row in rows]
            known = [error for error in errors if error is not None]
            cells = [entry["dataset"], shown(entry["epsilon"]), entry["method"]]
            cells.append(QUANTITIES[quantity])
            for statistic, paper in zip(STATISTICS.values(), entry[quantity], strict=True):
                cells += [percent(paper), percent(statistic(known) if known else None)]
            lines.append((*cells, f"{len(known)} of {len(rows)}"))
    columns.append("models measured")
    return Sheet(f"errors over the models, %, {NETWORKS[network]}", tuple(columns), lines)


def lower_sheet(table: Table, measured: Measured, network: str) -> Sheet:
    """How many models AdvIBP gives a lower verified error than CROWN-IBP does."""
    lines = []
    for entry in table.extras["lower"]:
        rows = _matching(table.rows, entry)
        if not rows:
            continue
        pairs = paired(rows, measured, network, "advibp", "crown-ibp")
        lower = sum(ours < theirs for ours, theirs in pairs.values())
        cells = [entry["dataset"], shown(entry["epsilon"]), f"{entry['count']}/{entry['models']}"]
        lines.append((*cells, f"{lower}/{len(pairs)}" if pairs else MISSING))
    columns = ("data set", "ε", "paper", "measured")
    return Sheet(f"AdvIBP models with a lower verified error, {NETWORKS[network]}", columns, lines)


def reduction_sheet(table: Table, measured: Measured, network: str) -> Sheet:
    """By how much AdvIBP's verified error is lower than the weighted sum's."""
    low, high = table.extras["reduction"]
    lines, reductions = [], []
    pairs = paired(table.rows, measured, network, "advibp", "weighted-sum")
    for (_, epsilon, model), (ours, theirs) in pairs.items():
        reductions.append(reduction(ours, theirs))
        texts = (percent(theirs), percent(ours), f"{reductions[-1]:.1f}%")
        lines.append((shown(epsilon), model, *texts))
    found = f"{min(reductions):.1f}% to {max(reductions):.1f}%" if reductions else MISSING
    title = (
        f"reduction of the verified error, paper {low}% to {high}%, measured {found}, "
        f"{NETWORKS[network]}"
    )
    return Sheet(title, ("ε", "model", "weighted-sum", "advibp", "reduction"), lines)


def stages_sheet(table: Table, measured: Measured) -> Sheet:
    """The verified error when each layer-wise stage ended."""
    errors = {row: stage_errors(measured.get(row, ())) for row in table.rows}
    count = max(map(len, errors.values()), default=0)
    lines = []
    for row in table.rows:
        found = measured.get(row, ())
        cells = [cell(found, f"stage-{stage}", "verified") for stage in range(count)]
        lines.append((row.dataset, shown(row.epsilon), row.method, row.model, *cells))
    columns = ("data set", "ε", "method", "model", *(f"after stage {s}" for s in range(count)))
    return Sheet("verified error after each layer-wise stage, %", columns, lines)


def seconds_sheet(table: Table, measured: Measured) -> Sheet:
    """Training time, averaged over the runs of a model and method that are complete."""
    lines = []
    for entry in table.extras["seconds"]:
        rows = _matching(table.rows, entry)
        runs = {
            m.run: m for row in rows for m in measured.get(row, ()) if m.epochs_done == m.epochs
        }
        if rows:
            cells = [entry["dataset"], entry["method"], entry["model"], f"{entry['seconds']}"]
            mean = statistics.mean(m.seconds for m in runs.values()) if runs else None
            cells += [MISSING if mean is None else f"{mean:.0f}", f"{len(runs)}"]
            epochs = dict.fromkeys(str(m.epochs) for m in runs.values())
            devices = dict.fromkeys(m.device for m in runs.values())
            lines.append((*cells, ", ".join(epochs), ", ".join(devices)))
    columns = ("data set", "method", "model", "paper", "measured", "runs", "epochs", "device")
    return Sheet("seconds of training, averaged over runs", columns, lines)


def literature_sheet(table: Table) -> Sheet:
    """What the paper cites as the best errors of others."""
    radii = {row.epsilon for row in table.rows}
    lines = [
        (
            shown(entry["epsilon"]),
            entry["method"],
            percent(entry["standard"]),
            percent(entry["verified"]),
        )
        for entry in table.extras["literature"]
        if entry["epsilon"] in radii
    ]
    title = "best errors reported in literature, %, as the paper has them"
    return Sheet(title, ("ε", "method", "standard", "verified"), lines)


def cell(found: Sequence[Measurement], network: str, quantity: str) -> str:
    """An error as text: over several seeds the median and the range."""
    known = errors_of(found, network, quantity)
    if not known:
        if any(m.begun and m.epochs_done < m.epochs for m in found):
            return UNFINISHED
        return UNEVALUATED if any(m.begun for m in found) else MISSING
    text = percent(statistics.median(known))
    return text if len(known) == 1 else f"{text} ({min(known):.2f}–{max(known):.2f})"


def percent(error: float | None) -> str:
    """An error with two decimals, – for none.

    >>> percent(4.1), percent(None)
    ('4.10', '–')
    """
    return MISSING if error is None else f"{error:.2f}"


def _matching(rows: Iterable[Row], entry: Mapping[str, Any]) -> list[Row]:
    """The rows that agree with an entry in whatever it says of a row."""
    kinds = [kind for kind in ("dataset", "epsilon", "method", "model") if kind in entry]
    return [row for row in rows if all(getattr(row, kind) == entry[kind] for kind in kinds)]
