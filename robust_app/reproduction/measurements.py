"""What the run directories already hold of the rows of a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_app.config import Config
from robust_app.errors import UserError, one_line
from robust_app.examination import find_result
from robust_app.metrics import best_epoch
from robust_app.reproduction.plan import Task
from robust_app.run_directory import RunDirectory


@dataclass(frozen=True)
class Measurement:
    """A row of a table with one seed, as far as it is done.

    Args:
        run: name of the run's directory.
        recipe: it began from.
        seed: of the run.
        begun: whether the run has been started.
        epochs_done, epochs: so far, and in all, layer-wise stages included.
        seconds: the epochs took together.
        device: the run was trained on, several joined by commas; empty if it was not.
        errors: of each network evaluated: its ``epoch``, and in percent ``standard``, ``verified``
            and ``pgd`` error, and ``ibp``, the verified error by interval bounds alone.
        complete: whether all networks that were asked for are evaluated.
    """

    run: str
    recipe: str
    seed: int
    begun: bool
    epochs_done: int
    epochs: int
    seconds: float
    device: str
    errors: Mapping[str, Mapping[str, float]]
    complete: bool


def read(out: Path, task: Task) -> Measurement:
    """What is done of a task, from the files of its run; nothing is computed.

    Args:
        out: the folder of all runs.
        task: of :func:`robust_app.reproduction.plan.tasks`.

    Raises:
        UserError: a file is damaged.
    """
    directory, config = RunDirectory(out / task.run.name), task.run.config
    metrics, results = directory.metrics(), directory.results()
    epochs = {network: epoch_of(network, config, metrics) for network in task.networks}
    found = {
        network: find_result(results, task.examination, epoch)
        for network, epoch in epochs.items()
        if epoch is not None
    }
    errors = {
        network: {"epoch": float(epochs[network] or 0), **_errors(result, directory)}
        for network, result in found.items()
        if result is not None
    }
    return Measurement(
        run=task.run.name,
        recipe=task.run.recipe,
        seed=config.seed,
        begun=directory.config_file.exists(),
        epochs_done=len(metrics),
        epochs=config.total_epochs,
        seconds=sum(epoch["seconds"] for epoch in metrics),
        device=", ".join(dict.fromkeys(str(made["device"]) for made in directory.environments())),
        errors=errors,
        complete=len(metrics) == config.total_epochs and len(errors) == len(task.networks),
    )


def nothing(task: Task) -> Measurement:
    """What is done of a task whose folder is another run's."""
    return Measurement(
        run=task.run.name,
        recipe=task.run.recipe,
        seed=task.run.config.seed,
        begun=False,
        epochs_done=0,
        epochs=task.run.config.total_epochs,
        seconds=0.0,
        device="",
        errors={},
        complete=False,
    )


def epoch_of(network: str, config: Config, metrics: list[dict[str, Any]]) -> int | None:
    """The epoch of a network of a run; None before the run is complete.

    Args:
        network: a name of :func:`~robust_app.loading.load_network`.
        config: of the run.
        metrics: of its epochs so far.
    """
    if len(metrics) < config.total_epochs:
        return None
    if network == "best":
        return best_epoch(metrics)
    if network == "last":
        return config.total_epochs
    return config.stage_end(int(network.removeprefix("stage-")))


def _errors(result: Mapping[str, Any], directory: RunDirectory) -> dict[str, float]:
    try:
        images = result["examples"]
        errors = {name: float(result[f"{name}_error"]) for name in ("standard", "verified", "pgd")}
        return errors | {"ibp": 100 * (images - result["shares"]["ibp"]["certified"]) / images}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{directory.results_file}: damaged ({type(error).__name__}: {one_line(error)})"
        ) from error
