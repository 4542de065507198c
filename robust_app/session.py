"""A run in its directory: begun or resumed, saved after every epoch, evaluated at the end."""

from collections.abc import Callable
from typing import Any

from torch import nn

from robust_app import checkpoint
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.errors import UserError
from robust_app.evaluation import VERIFIERS, Errors, evaluate
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer, Watcher, build_network

FORMAT = {"format": "robust-app 1"}


def best_epoch(metrics: list[dict[str, Any]]) -> int | None:
    """The epoch with the lowest verified, then standard, error on the held-out images.

    Test images play no part. None where nothing is held out.
    """
    measured = [epoch for epoch in metrics if epoch["verified_error"] is not None]
    if not measured:
        return None
    best = min(measured, key=lambda epoch: (epoch["verified_error"], epoch["standard_error"]))
    return int(best["epoch"])


def run(trainer: Trainer, directory: RunDirectory, watcher: Watcher, stop_after: int) -> None:
    """Train until ``stop_after`` epochs are done, from where the directory's checkpoint left off.

    The checkpoint is the last file written in an epoch: whatever moment the run is killed at, it
    resumes from its last whole epoch to the same bits.

    Args:
        trainer: freshly made from the directory's configuration.
        directory: begun, and locked by the leading process.
        watcher: told of every batch and epoch.
        stop_after: number of epochs, counted from the start of the run.

    Raises:
        UserError: if the checkpoint is damaged or of another network.
    """
    if directory.checkpoint_file.exists():
        _restore(trainer, directory)
    elif directory.metrics():
        raise UserError(f"{directory.checkpoint_file}: missing, so the run cannot be resumed")
    if not trainer.world.agree_on(trainer.epochs_done):
        raise UserError(
            f"{directory.checkpoint_file}: the processes see different checkpoints; "
            "they need one shared folder"
        )
    if trainer.world.leads and trainer.epochs_done == 0:
        checkpoint.save(FORMAT | trainer.state_dict(), directory.checkpoint_file)
    metrics = directory.metrics()[: trainer.epochs_done]
    while trainer.epochs_done < stop_after:
        metrics.append(trainer.train_epoch(watcher))
        if trainer.world.leads:
            _save(trainer, directory, metrics)
        watcher.epoch(metrics[-1])  # told last: what the user has seen is safe


def _save(trainer: Trainer, directory: RunDirectory, metrics: list[dict[str, Any]]) -> None:
    state = FORMAT | trainer.state_dict()
    model = FORMAT | {"epoch": trainer.epochs_done, "network": state["network"]}
    directory.write_metrics(metrics)
    if best_epoch(metrics) == trainer.epochs_done:
        checkpoint.save(model, directory.best_file)
    checkpoint.save(model, directory.last_file)
    checkpoint.save(state, directory.checkpoint_file)


def _restore(trainer: Trainer, directory: RunDirectory) -> None:
    path = directory.checkpoint_file
    state = checkpoint.load(path)
    try:
        checkpoint.restore(trainer.network, state["network"], path)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.epochs_done = state["epochs_done"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: does not fit this run ({error})") from error


def load_network(directory: RunDirectory, dataset: Dataset, which: str) -> tuple[nn.Module, int]:
    """A saved network of a run, on the device of the data, and the epoch it is of.

    Args:
        directory: of the run.
        dataset: the run's own.
        which: ``"best"`` or ``"last"``.

    Raises:
        UserError: if the file is missing, damaged or of another network.
    """
    path = directory.best_file if which == "best" else directory.last_file
    saved = checkpoint.load(path)
    if not {"network", "epoch"} <= saved.keys():
        raise UserError(f"{path}: holds no network")
    network = build_network(directory.config(), dataset)
    checkpoint.restore(network, saved["network"], path)
    return network.eval().to(dataset.x_test.device), int(saved["epoch"])


def measure(
    network: nn.Module,
    dataset: Dataset,
    config: Config,
    verifier: str,
    on_batch: Callable[[int], None],
) -> Errors:
    """Errors on the test images, attacked and verified as the configuration says.

    Args:
        network: on the device of the data.
        dataset: its test part is used.
        config: radius, strength of the attack, and seed.
        verifier: a key of :data:`~robust_app.evaluation.VERIFIERS`.
        on_batch: told how many images were done, after each batch.
    """
    return evaluate(
        network,
        dataset.x_test,
        dataset.y_test,
        config.evaluation_epsilon,
        pgd_steps=config.pgd_steps,
        pgd_restarts=config.pgd_restarts,
        seed=config.seed,
        verifier=VERIFIERS[verifier],
        on_batch=on_batch,
    )
