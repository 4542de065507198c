"""Networks on the test images, as their user watches it; what is found is kept."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import nn

from robust_app import examination, loading, reporting, session
from robust_app.batches import as_float
from robust_app.data import Dataset
from robust_app.error_counts import Errors
from robust_app.evaluation import misclassified
from robust_app.examination import Examination
from robust_app.exchange import results
from robust_app.run_directory import RunDirectory
from robust_app.verifiers import VERIFIERS

SEED = 0  # of the images and attacks of a network from elsewhere
NEAR_CHANCE = 0.1  # the share of what one class for all gets wrong, below which to warn


def evaluate(
    directory: RunDirectory,
    dataset: Dataset,
    console: Console,
    how: Examination,
    seed: int,
    output: Path | None = None,
) -> None:
    """Evaluate a run's best and last network on the test images; print and keep the errors.

    Args:
        directory: of the run; locked, unless there is an ``output``.
        dataset: the run's own.
        console: where to.
        how: what to do with the images.
        seed: see :func:`robust_app.examination.measure`.
        output: a JSON file to write in the place of the run's, which is left as it is then; see
            :func:`robust_app.exchange.results.check`.

    Raises:
        UserError: a file is missing or damaged, ``how`` does not fit the network or the data, or
            the output cannot be written.
    """
    if output is None:
        directory.results()  # a damaged file is to be noticed before the work, not after it
    else:
        results.check(output)
    rows: dict[int, tuple[str, Errors]] = {}
    images = how.images or len(dataset.x_test)
    if lost := session.lost_best(directory):
        reporting.say(console, lost)
    for which in ("best", "last"):
        if which == "best" and not directory.best_file.exists():
            continue
        network, epoch = loading.load_network(directory, dataset, which)
        if epoch in rows:  # the best is the last
            rows[epoch] = (examination.network_name("best, last", epoch), rows[epoch][1])
            continue
        name = examination.network_name(which, epoch)
        with reporting.evaluating(console, name, images) as on_batch:
            rows[epoch] = (name, examination.measure(network, dataset, how, seed, on_batch))
    _show(console, dataset, how, list(rows.values()))
    constant = _accuracy_of_one_class(dataset)
    for name, errors in rows.values():
        if how.images is None and _near_chance(1 - errors.standard_error / 100, constant):
            reporting.say(
                console,
                f"warning: near chance: {name} has a standard error of {errors.standard_error:.2f}%"
                f", one class for all {100 * (1 - constant):.2f}%; its training has collapsed, "
                "for instance because the ramp of ε is too short: then more epochs help",
            )
    entries = [
        examination.entry(name, how, errors, dataset, seed) for name, errors in rows.values()
    ]
    if output is None:
        directory.add_results(entries)
    else:
        of_run = {"network": str(directory.path), "dataset": dataset.name}
        results.write(output, of_run | dataclasses.asdict(how) | {"networks": entries})


def evaluate_outside(
    name: str,
    network: nn.Module,
    dataset: Dataset,
    console: Console,
    how: Examination,
    output: Path | None = None,
) -> None:
    """Evaluate a network from elsewhere on the test images; print its errors, and keep them.

    Its accuracy on the images as they are comes first: one near chance most often means images in
    another layout or normalisation than the network was trained on.

    Args:
        name: of the network, for the user.
        network: in evaluation mode, on the device of the data.
        dataset: its test part is used.
        console: where to.
        how: what to do with the images.
        output: a JSON file to write, see :func:`robust_app.exchange.results.check`; none if left
            out.

    Raises:
        UserError: a verifier has no rule for a layer, ``how`` does not fit the data, or the file
            cannot be written.
    """
    if output is not None:
        results.check(output)
    x, y = dataset.x_test, dataset.y_test
    for verifier in how.verifiers:  # a layer without a rule is to be noticed before the attack
        VERIFIERS[verifier].decide(network, as_float(x[:1]), y[:1], how.epsilon, 0.0)
    accuracy = 1 - misclassified(network, x, y) / len(y)
    constant = _accuracy_of_one_class(dataset)
    line = f"{name}: classifies {accuracy:.2%} of the {len(y)} test images rightly"
    reporting.say(console, line)
    if _near_chance(accuracy, constant):
        reporting.say(
            console,
            f"warning: that is near chance (one class for all: {constant:.2%}); it takes images in "
            f"[0, 1] of shape {dataset.image_shape}, with its normalisation inside",
        )
    with reporting.evaluating(console, name, how.images or len(y)) as on_batch:
        errors = examination.measure(network, dataset, how, SEED, on_batch)
    _show(console, dataset, how, [(name, errors)])
    if output is not None:
        content = {"network": name, "dataset": dataset.name}
        results.write(output, content | examination.entry(name, how, errors, dataset, SEED))


def _accuracy_of_one_class(dataset: Dataset) -> float:
    """Of the most frequent one, on the test images."""
    return dataset.y_test.bincount().max().item() / len(dataset.y_test)


def _near_chance(accuracy: float, constant: float) -> bool:
    return accuracy < constant + NEAR_CHANCE * (1 - constant)


def _show(
    console: Console, dataset: Dataset, how: Examination, rows: Sequence[tuple[str, Errors]]
) -> None:
    title = (
        f"{dataset.name}: {how.images or len(dataset.x_test)} test images, ε = {how.epsilon:.4g}, "
        f"verified by {', '.join(how.verifiers)}, PGD of {how.pgd_steps} steps"
    )
    console.print(reporting.errors_table(title, rows))
    if how.verifiers != ("ibp",):
        console.print(reporting.shares_table(rows))
