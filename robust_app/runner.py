"""A run as its user watches it: progress while it trains, errors when it is evaluated."""

import dataclasses
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from robust_app import curves, environment, pictures, reporting, session
from robust_app.data import Dataset
from robust_app.evaluation import Errors
from robust_app.events import Events
from robust_app.run_directory import RunDirectory
from robust_app.session import Examination
from robust_app.training import Trainer
from robust_app.watching import Watcher, Watchers


def train(
    trainer: Trainer,
    directory: RunDirectory,
    console: Console,
    *,
    data_root: Path | None,
    stop_after: int,
    tensorboard: bool = False,
) -> None:
    """Begin or resume a run, watched where this process leads, and draw its curves.

    Args:
        trainer: freshly made.
        directory: locked by the leading process; begun here if it holds no run.
        console: of the leading process.
        data_root: where the data lie, noted for the next time.
        stop_after: number of epochs, counted from the start of the run.
        tensorboard: whether to write events for it too.

    Raises:
        UserError: see :func:`robust_app.session.run`.
    """
    world, config = trainer.world, trainer.config
    if not world.leads:
        session.run(trainer, directory, reporting.Silent(), stop_after)
        return
    if not directory.config_file.exists():
        directory.start(config)
    directory.add_environment(
        environment.describe(world.device, world.size, config.seed, data_root)
        | {"execution": trainer.execution.name}
    )
    console.print(f"run directory: {directory.path}", markup=False, soft_wrap=True)
    with ExitStack() as stack:
        watchers: list[Watcher] = [
            stack.enter_context(reporting.watcher(console, config.total_epochs))
        ]
        if tensorboard:
            watchers.append(stack.enter_context(closing(Events(directory))))
        session.run(trainer, directory, Watchers(watchers), stop_after)
    runs = {directory.path.resolve().name: directory.metrics()}
    pictures.save(curves.figure(runs), [directory.curves_file])


def evaluate(
    directory: RunDirectory, dataset: Dataset, console: Console, how: Examination, seed: int
) -> None:
    """Evaluate a run's best and last network on the test images; print and keep the errors.

    Args:
        directory: of the run, locked.
        dataset: the run's own.
        console: where to.
        how: what to do with the images.
        seed: see :func:`robust_app.session.measure`.

    Raises:
        UserError: a file is missing or damaged, or ``how`` does not fit the network or the data.
    """
    directory.results()  # a damaged file is to be noticed before the work, not after it
    rows: dict[int, tuple[str, Errors]] = {}
    images = how.images or len(dataset.x_test)
    for which in ("best", "last"):
        if which == "best" and not directory.best_file.exists():
            continue
        network, epoch = session.load_network(directory, dataset, which)
        if epoch in rows:  # the best is the last
            rows[epoch] = (f"best, last (epoch {epoch})", rows[epoch][1])
            continue
        name = f"{which} (epoch {epoch})"
        with reporting.evaluating(console, name, images) as on_batch:
            rows[epoch] = (name, session.measure(network, dataset, how, seed, on_batch))
    title = (
        f"{dataset.name}: {images} test images, ε = {how.epsilon:.4g}, "
        f"verified by {', '.join(how.verifiers)}, PGD of {how.pgd_steps} steps"
    )
    console.print(reporting.errors_table(title, rows.values()))
    if how.verifiers != ("ibp",):
        console.print(reporting.shares_table(rows.values()))
    directory.add_results(
        [
            {"network": name, **dataclasses.asdict(how), **errors.as_dict()}
            for name, errors in rows.values()
        ]
    )
