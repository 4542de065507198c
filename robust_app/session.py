"""A run in its directory: begun or resumed, and saved after every epoch."""

import warnings
from typing import Any

from robust_app import checkpoint, divergence
from robust_app.config import Config
from robust_app.divergence import Diverged
from robust_app.errors import UserError, one_line
from robust_app.examination import Examination, find_result
from robust_app.loading import check_config, content
from robust_app.metrics import best_epoch
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from robust_app.watching import Watcher


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


def evaluated(directory: RunDirectory, how: Examination) -> bool:
    """Whether ``results.json`` has such an evaluation of the best and of the last network."""
    metrics, results = directory.metrics(), directory.results()
    epochs = {len(metrics), best_epoch(metrics) or len(metrics)}
    return all(find_result(results, how, epoch) for epoch in epochs)
