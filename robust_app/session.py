"""A run in its directory: begun or resumed, saved after every epoch, and read again."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_app import checkpoint, data, divergence, documents
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.divergence import Diverged
from robust_app.errors import SHOWN, UserError, one_line, shown
from robust_app.examination import Examination, find_result
from robust_app.metrics import epochs_taken_over
from robust_app.networks import build_network
from robust_app.overrides import differences
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from robust_app.watching import Watcher


def content(config: Config, **values: Any) -> dict[str, Any]:
    """What a file of a run holds, with the configuration that it was made with."""
    return {"format": checkpoint.FORMAT, "config": config.to_toml()} | values


def check_config(saved: dict[str, Any], config: Config, path: Path) -> None:
    """See that a file was made with the configuration that the run has now.

    Where the data lie may have changed: that they are the same, their checksum tells.

    Raises:
        UserError: if it was made with another, or does not say with which.
    """
    try:
        made_with = Config.from_mapping(documents.parse_toml(saved["config"]))
    except (LookupError, TypeError, AttributeError, ValueError, UserError) as error:
        reason = f"holds no configuration that this version reads ({one_line(error)})"
        raise UserError(f"{path}: {reason}") from error
    found = differences(dataclasses.replace(made_with, dataset=config.dataset), config)
    if found:
        reason = "made with another configuration than config.toml has"
        raise UserError(f"{path}: {reason} ({found[:SHOWN]})")


def load_data(
    directory: RunDirectory,
    config: Config,
    data_root: Path | None,
    download: bool,
    device: torch.device | str,
) -> Dataset:
    """The data of a run, seen to be its own where it noted their checksum.

    Args:
        directory: of the run, or of one that has yet to begin.
        config: of the run.
        data_root: where the data lie; None for where the run found them last.
        download: see :func:`robust_app.data.load`.
        device: to put them on.

    Raises:
        UserError: if they are missing, damaged or others.
    """
    dataset = data.load(config.dataset, data_root or directory.data_root(), download).to(device)
    noted = [made["data"] for made in directory.environments() if "data" in made]
    if noted and dataset.checksum != noted[-1]:
        raise UserError(
            f"{directory.path}: made on other data than these ({shown(noted[-1])[:16]}…, found "
            f"{shown(dataset.checksum)[:16]}…); give the run's with --data-root"
        )
    return dataset


def best_epoch(metrics: list[dict[str, Any]]) -> int | None:
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


def run(
    trainer: Trainer,
    directory: RunDirectory,
    watcher: Watcher,
    stop_after: int,
    on_divergence: str = divergence.STOP,
) -> None:
    """Train until ``stop_after`` epochs are done, from where the directory's checkpoint left off.

    An epoch is done once its checkpoint is written: whatever moment the run is killed at, it
    resumes from its last whole epoch to the same bits. Its metrics are written before, and are
    forgotten if the checkpoint is not; the networks after, and are made from it if they are not.

    Args:
        trainer: freshly made from the directory's configuration.
        directory: begun, and locked by the leading process.
        watcher: told of every batch and epoch.
        stop_after: number of epochs, counted from the start of the run.
        on_divergence: one of :data:`robust_app.divergence.CHOICES`.

    Raises:
        UserError: if the checkpoint is damaged or of another network, or metrics are missing.
        Diverged: in every process, with the same words.
    """
    if directory.checkpoint_file.exists():
        _restore(trainer, directory)
    elif directory.metrics():
        raise UserError(f"{directory.checkpoint_file}: missing, so the run cannot be resumed")
    _check_agreement(trainer, directory)
    metrics = directory.metrics()[: trainer.epochs_done]
    if len(metrics) < trainer.epochs_done:
        raise UserError(
            f"{directory.metrics_file}: {trainer.epochs_done} epochs are done, "
            f"found the metrics of {len(metrics)}"
        )
    if trainer.world.leads:
        if trainer.epochs_done == 0:
            checkpoint.save(_state(trainer), directory.checkpoint_file)
        else:
            _mend(trainer, directory, metrics, watcher)
    while trainer.epochs_done < stop_after:
        try:
            metrics.append(trainer.train_epoch(watcher))
        except Diverged as error:
            if on_divergence == divergence.STOP:
                raise
            _go_back(trainer, directory, watcher, error)
            continue
        if trainer.world.leads:
            _save(trainer, directory, metrics)
        watcher.epoch(metrics[-1])  # told last: what the user has seen is safe


def _go_back(trainer: Trainer, directory: RunDirectory, watcher: Watcher, error: Diverged) -> None:
    """Continue from the last checkpoint at a lower learning rate, and note it there."""
    scale = trainer.learning_rate_scale * divergence.FACTOR
    if scale < divergence.LEAST:
        raise error
    _restore(trainer, directory)
    _check_agreement(trainer, directory)  # also: all have read the file that is replaced now
    trainer.learning_rate_scale = scale
    if trainer.world.leads:
        directory.add_divergence(error.where, scale)
        checkpoint.save(_state(trainer), directory.checkpoint_file)
    watcher.note(
        f"training diverged in {error.where}; it goes on after epoch {trainer.epochs_done} "
        f"at {scale:g} of the learning rate"
    )


def _check_agreement(trainer: Trainer, directory: RunDirectory) -> None:
    if not trainer.world.agree_on(trainer.epochs_done):
        raise UserError(
            f"{directory.checkpoint_file}: the processes see different checkpoints; "
            "they need one shared folder"
        )


def _save(trainer: Trainer, directory: RunDirectory, metrics: list[dict[str, Any]]) -> None:
    directory.write_metrics(metrics)
    checkpoint.save(_state(trainer), directory.checkpoint_file)
    _save_networks(trainer, directory, metrics)


def _state(trainer: Trainer) -> dict[str, Any]:
    return content(trainer.config, **trainer.state_dict())


def _save_networks(
    trainer: Trainer, directory: RunDirectory, metrics: list[dict[str, Any]]
) -> None:
    network = trainer.certifiable().state_dict()
    model = content(trainer.config, epoch=trainer.epochs_done, network=network)
    if best_epoch(metrics) == trainer.epochs_done:
        checkpoint.save(model, directory.best_file)
    if trainer.config.stages and ends_stage(trainer.config, trainer.epochs_done):
        checkpoint.save(model, directory.stage_file(trainer.stage.number))
    checkpoint.save(model, directory.last_file)


def _mend(
    trainer: Trainer, directory: RunDirectory, metrics: list[dict[str, Any]], watcher: Watcher
) -> None:
    """Bring metrics and networks to the epoch of the checkpoint, and tell of what cannot be."""
    if len(directory.metrics()) > len(metrics):
        directory.write_metrics(metrics)
    last, lost = directory.last_file, lost_best(directory)
    killed = not last.exists() or checkpoint.load(last).get("epoch") != trainer.epochs_done
    if killed or (lost and best_epoch(metrics) == trainer.epochs_done):
        _save_networks(trainer, directory, metrics)
        lost = lost_best(directory)
    if lost:
        watcher.note(lost)


def has_trained(directory: RunDirectory, epochs: int) -> bool:
    """Whether so many epochs are done, their networks written too: nothing is left to train.

    The checkpoint is not looked at.
    """
    if len(directory.metrics()) < epochs or not directory.last_file.exists():
        return False
    done = checkpoint.load(directory.last_file).get("epoch")
    return isinstance(done, int) and done >= epochs


def lost_best(directory: RunDirectory) -> str | None:
    """What to tell where ``metrics.jsonl`` has a best epoch, and its network is gone."""
    best = best_epoch(directory.metrics())
    if best is None or directory.best_file.exists():
        return None
    return f"{directory.best_file}: missing, the network of epoch {best}"


def _restore(trainer: Trainer, directory: RunDirectory) -> None:
    path = directory.checkpoint_file
    state = checkpoint.load(path)
    check_config(state, trainer.config, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what is refused here anyway
            trainer.load_state_dict(state)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit this run ({one_line(error)})") from error


def ends_stage(config: Config, epochs_done: int) -> bool:
    """Whether a stage is complete after so many epochs; stage 0 trains the whole network."""
    stages, rest = divmod(epochs_done - config.epochs, config.stage_epochs)
    return stages >= 0 and rest == 0


def load_network(
    directory: RunDirectory, dataset: Dataset, which: str
) -> tuple[nn.Sequential, int]:
    """A saved network of a run, on the device of the data, and the epoch it is of.

    Args:
        directory: of the run.
        dataset: the run's own.
        which: ``"best"``, ``"last"`` or ``"stage-S"``, as it was when stage S ended.

    Raises:
        UserError: if the file is missing, damaged, of another network or configuration.
    """
    path, config = directory.network_file(which), directory.config()
    if not path.exists():
        raise UserError(f"{path}: missing; a run has it once it has trained such an epoch itself")
    saved = checkpoint.load(path)
    if not {"network", "epoch"} <= saved.keys() or not isinstance(saved["epoch"], int):
        raise UserError(f"{path}: holds no network")
    check_config(saved, config, path)
    network = build_network(config, dataset)
    checkpoint.restore(network, saved["network"], path)
    return network.eval().to(dataset.x_test.device), saved["epoch"]


def evaluated(directory: RunDirectory, how: Examination) -> bool:
    """Whether ``results.json`` has such an evaluation of the best and of the last network."""
    metrics, results = directory.metrics(), directory.results()
    epochs = {len(metrics), best_epoch(metrics) or len(metrics)}
    return all(find_result(results, how, epoch) for epoch in epochs)
