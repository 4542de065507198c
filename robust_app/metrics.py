"""The lines of ``metrics.jsonl``, one an epoch: what is shown of them, and the best one."""

from typing import Any, NamedTuple

Metrics = list[dict[str, Any]]
"""The lines of a run, one an epoch, in order."""


class Metric(NamedTuple):
    """A number of an epoch.

    Attributes:
        key: in ``metrics.jsonl``.
        name: in words, with its unit.
        group: of those that belong together.
        ratios: whether these count, not differences.
    """

    key: str
    name: str
    group: str
    ratios: bool = False


SHOWN = (
    Metric("natural_loss", "natural loss", "losses", ratios=True),
    Metric("adversarial_loss", "adversarial loss", "losses", ratios=True),
    Metric("certified_loss", "certified loss", "losses", ratios=True),
    Metric("mixed_loss", "mixed loss", "losses", ratios=True),
    Metric("standard_error", "held-out standard error, %", "errors", ratios=True),
    Metric("verified_error", "held-out verified error, %", "errors", ratios=True),
    Metric("epsilon", "ε", "schedule"),
    Metric("fosc_threshold", "c_t, the threshold of FOSC", "schedule", ratios=True),
    Metric("adversarial_weight", "weight of the adversarial loss", "weights", ratios=True),
    Metric("certified_weight", "weight of the certified loss", "weights", ratios=True),
    Metric("cosine", "cosine of the moments", "moments"),
    Metric("conflicts", "share of steps in conflict", "moments"),
    Metric("certified_first", "share of steps, certified loss first", "moments"),
)


def values(metrics: Metrics, key: str) -> dict[int, float]:
    """A metric by epoch, without the epochs that lack it.

    Runs of other methods and phases, and of older versions, lack some.

    >>> values([{"epoch": 1, "cosine": 0.5}, {"epoch": 2}, {"epoch": 3, "cosine": None}], "cosine")
    {1: 0.5}
    """
    return {line["epoch"]: line[key] for line in metrics if line.get(key) is not None}


def epochs_taken_over(metrics: Metrics) -> int:
    """How many epochs a fork has of the run that it goes on from.

    >>> epochs_taken_over([{"epoch": 1, "taken_over": True}, {"epoch": 2}])
    1
    """
    return sum(line.get("taken_over", False) for line in metrics)


def best_epoch(metrics: Metrics) -> int | None:
    """The epoch with the lowest verified, then standard, error on the held-out images.

    Test images play no part. None where nothing is held out, and before a fork has trained: the
    networks of the epochs that it took over are the other run's.
    """
    own = metrics[epochs_taken_over(metrics) :]
    measured = [epoch for epoch in own if epoch["verified_error"] is not None]
    if not measured:
        return None
    best = min(measured, key=lambda epoch: (epoch["verified_error"], epoch["standard_error"]))
    return int(best["epoch"])
