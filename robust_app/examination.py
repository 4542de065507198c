"""How networks are examined on test images, and what is known of them already."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_app import environment, methods
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.error_counts import Errors
from robust_app.errors import UserError, shown
from robust_app.evaluation import evaluate
from robust_app.value_rules import ATTEMPTS, POSITIVE, POSITIVE_INTEGER, UNIT

_RULES = {
    "epsilon": UNIT,
    "time_limit": POSITIVE,
    "pgd_steps": ATTEMPTS,
    "pgd_restarts": ATTEMPTS,
    "images": POSITIVE_INTEGER,
}


@dataclass(frozen=True)
class Examination:
    """How networks are evaluated on test images.

    Attributes:
        epsilon: radius in pixels of [0, 1].
        pgd_steps, pgd_restarts: strength of the attack, from 1 to a million each.
        verifiers: the cascade; see :func:`~robust_app.evaluation.evaluate`.
        time_limit: seconds for an image, of the verifiers that could go on for ever; above 0.
        images: how many test images, drawn at random by the run's seed; None for all.

    Raises:
        UserError: a value is no number, or out of its range.
    """

    epsilon: float
    pgd_steps: int
    pgd_restarts: int
    verifiers: tuple[str, ...] = ("ibp",)
    time_limit: float = 60.0
    images: int | None = None

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if not (rule.admits(value) or (name == "images" and value is None)):
                raise UserError(f"{name}: expected {rule.expectation}, found {shown(value)}")

    @classmethod
    def of(cls, config: Config) -> "Examination":
        """The one that a run's configuration asks for."""
        return cls(
            config.evaluation_epsilon,
            config.pgd_steps,
            config.pgd_restarts,
            methods.verifiers_of(config),
        )


def network_name(which: str, epoch: int) -> str:
    """What an evaluation calls a network of a run.

    >>> network_name("best, last", 12)
    'best, last (epoch 12)'
    """
    return f"{which} (epoch {epoch})"


def epoch_of_name(name: object) -> int | None:
    """The epoch of a network by the name that :func:`network_name` gave it; None of another.

    >>> epoch_of_name("best, last (epoch 12)")
    12
    """
    found = re.search(r"\(epoch (\d{1,19})\)$", str(name))  # int() refuses thousands
    return None if found is None else int(found[1])


def entry(
    network: str, how: Examination, errors: Errors, dataset: Dataset, seed: int
) -> dict[str, Any]:
    """What is kept of an evaluation, for JSON: its figures, and all that they depend on.

    Args:
        network: its name, of a run's as :func:`network_name` gives it.
        how: it was evaluated.
        errors: that were found.
        dataset: the images are of, on the device that the network was on.
        seed: of :func:`measure`.
    """
    facts = environment.describe(dataset.x_test.device, 1, seed, None)
    made_with = {"environment": facts, "data": dataset.checksum}
    return {"network": network, **asdict(how), **errors.as_dict(), **made_with}


def find_result(
    results: list[dict[str, Any]], how: Examination, epoch: int
) -> dict[str, Any] | None:
    """The evaluation of one epoch's network in one way, the newest if there are several.

    Args:
        results: entries of ``results.json``.
        how: what must agree with the entry.
        epoch: of the network, by the entry's name of it.
    """
    # As JSON has it: lists, not tuples.
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(how)))
    matching = (
        result
        for result in reversed(results)
        if epoch_of_name(result.get("network")) == epoch
        and all(result.get(key) == value for key, value in wanted.items())
    )
    return next(matching, None)


def measure(
    network: nn.Module,
    dataset: Dataset,
    how: Examination,
    seed: int,
    on_batch: Callable[[int], object],
) -> Errors:
    """Errors on the test images.

    Args:
        network: on the device of the data.
        dataset: its test part is used.
        how: what to do with them.
        seed: of the choice of images and of the attack's random starts.
        on_batch: told how many images were done, after each batch.

    Raises:
        UserError: if there are fewer test images than asked for.
    """
    x, y = dataset.x_test, dataset.y_test
    if how.images is not None:
        chosen = drawn(dataset, how.images, seed).to(x.device)
        x, y = x[chosen], y[chosen]
    return examine(network, x, y, how, seed, on_batch)


def drawn(dataset: Dataset, count: int, seed: int) -> Tensor:
    """Indices of ``count`` test images, drawn at random by ``seed`` alone: int64 ``(count,)``.

    Raises:
        UserError: if there are fewer test images.
    """
    found = len(dataset.x_test)
    if count > found:
        raise UserError(f"images: expected at most the {found} test images, found {count}")
    return torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:count]


def examine(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    how: Examination,
    seed: int,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Errors:
    """:func:`~robust_app.evaluation.evaluate` as an :class:`Examination` says."""
    return evaluate(
        network,
        x,
        labels,
        how.epsilon,
        pgd_steps=how.pgd_steps,
        pgd_restarts=how.pgd_restarts,
        seed=seed,
        verifiers=how.verifiers,
        time_limit=how.time_limit,
        on_batch=on_batch,
    )
