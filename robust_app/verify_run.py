"""Whether a run's networks have the errors that the run reported."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from torch import nn

from robust_app import checkpoint, data, environment, examination, loading, session, verifiers
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.epochs import held_out_errors
from robust_app.errors import UserError, shown
from robust_app.examination import Examination
from robust_app.metrics import best_epoch, epochs_taken_over
from robust_app.run_directory import RunDirectory
from robust_app.value_rules import INTEGER, NUMBER

FIGURES = ("standard_error", "pgd_error", "verified_error", "certified", "falsified", "undecided")

Kept = Mapping[str, tuple[int, nn.Module]]
"""The networks of a run by their names, ``best``, ``last`` or ``stage-S``, with their epochs."""

Networks = Mapping[int, nn.Module]
"""The same by their epochs."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""What to tell of the images that were done, given a name and their number."""


@dataclass(frozen=True)
class Claim:
    """A figure that a run reported.

    Attributes:
        where: it did.
        epoch: of the network.
        figure: its name.
        reported: what the run said: errors in percent, or a number of images.
        found: what its network gives now; None if it is kept no longer.
        made_with: the environment it was reported from, empty if unknown.
        left_open: how far apart a time limit may have left the two; 0 where none counts.
    """

    where: str
    epoch: int
    figure: str
    reported: float
    found: float | None
    made_with: Mapping[str, Any]
    left_open: float = 0.0

    @property
    def differs(self) -> bool:
        """Whether its network gives another figure now."""
        return self.found is not None and self.found != self.reported

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against it."""
        if self.found is None or not self.differs:
            return True
        return abs(self.found - self.reported) <= self.left_open * (1 + 1e-9)


def check_files(directory: RunDirectory, kept: Kept) -> None:
    """See that the files of a run are whole and belong to one another, its networks among them.

    Raises:
        UserError: a file is missing, damaged, of another configuration or of other epochs than
            the checkpoint.
    """
    state, config = checkpoint.load(directory.checkpoint_file), directory.config()
    loading.check_config(state, config, directory.checkpoint_file)
    done = state.get("epochs_done")
    if not isinstance(done, int) or not INTEGER.admits(done):
        raise UserError(f"{directory.checkpoint_file}: damaged (it does not say how many epochs)")
    metrics = directory.metrics()
    if len(metrics) < done:
        raise UserError(
            f"{directory.metrics_file}: {done} epochs are done, found the metrics of {len(metrics)}"
        )
    taken_over = epochs_taken_over(metrics)
    before = [run["epochs"] for run in directory.origin()][-1:] or [0]
    if [taken_over] != before:
        raise UserError(
            f"{directory.origin_file}: says that {before[0]} epochs were taken over, "
            f"{directory.metrics_file.name} says {taken_over}"
        )
    if lost := session.lost_best(directory):
        raise UserError(lost)
    ended = (done - config.epochs) // config.stage_epochs + 1 if config.stages else 0
    stages = {f"stage-{stage}": config.stage_end(stage) for stage in range(ended)}
    expected = {"best": best_epoch(metrics[:done]), "last": done}
    expected |= {name: epoch for name, epoch in stages.items() if epoch >= taken_over}
    for name in {**expected, **kept}:
        epoch, found = expected.get(name), kept[name][0] if name in kept else None
        if found != epoch:
            raise UserError(
                f"{directory.network_file(name)}: expected {_network_of(epoch)}, found "
                f"{_network_of(found)}; if the run was broken off, train --resume makes it"
            )


def _network_of(epoch: int | None) -> str:
    return "none" if epoch is None else f"the network of epoch {epoch}"


def load_networks(directory: RunDirectory, dataset: Dataset) -> Kept:
    """The networks that a run keeps: the best, the last, and those of ended stages.

    Raises:
        UserError: if a file is damaged or of another network, or there is none.
    """
    names = [name for name in ("best", "last") if directory.network_file(name).exists()]
    names += [path.stem for path in directory.stage_files()]
    if not names:
        raise UserError(f"{directory.path}: nothing to verify, no network is saved")
    loaded = {name: loading.load_network(directory, dataset, name) for name in names}
    return {name: (epoch, network) for name, (network, epoch) in loaded.items()}


def of_held_out_images(
    directory: RunDirectory, dataset: Dataset, networks: Networks
) -> Iterator[Claim]:
    """The errors that ``metrics.jsonl`` has for the epochs whose networks are kept."""
    config, made_with = directory.config(), directory.last_environment()
    lines = {line["epoch"]: line for line in directory.metrics()}
    _, _, x, labels = data.split(dataset, config.held_out, config.seed)
    alone = World(0, 1, dataset.x_test.device)
    for epoch in sorted(networks.keys() & lines.keys()):
        if lines[epoch]["verified_error"] is not None:
            found = held_out_errors(networks[epoch], x, labels, config, alone)
            for figure, error in found.items():
                reported = lines[epoch][figure]
                yield Claim("metrics.jsonl", epoch, figure, reported, error, made_with)


def of_test_images(
    directory: RunDirectory, dataset: Dataset, networks: Networks, progress: Progress
) -> Iterator[Claim]:
    """The figures of each evaluation in ``results.json``, repeated as it was made.

    Raises:
        UserError: if an entry is damaged, or of other data.
    """
    config, of_run = directory.config(), directory.last_environment()
    for number, entry in enumerate(directory.results(), 1):
        where = f"results.json, {number}"
        try:
            how, epoch = _examination(entry), _epoch(entry["network"])
            reported = {figure: _number(entry, figure) for figure in FIGURES}
            made_with = _environment(entry) or of_run
        except (KeyError, TypeError, ValueError, UserError) as error:
            reason = f"{directory.results_file}: damaged (entry {number}: {error})"
            raise UserError(reason) from error
        if "data" in entry and entry["data"] != dataset.checksum:
            raise UserError(f"{directory.results_file}: entry {number} is of other data than these")
        found: dict[str, Any] = {}
        images = how.images or len(dataset.x_test)
        if epoch in networks:
            with progress(where, images) as on_batch:
                errors = examination.measure(networks[epoch], dataset, how, config.seed, on_batch)
            found = errors.as_dict()
        left_open = _left_open(how, reported, found, images)
        for figure, value in reported.items():
            claim = (where, epoch, figure, value, found.get(figure), made_with)
            yield Claim(*claim, left_open.get(figure, 0.0))


def _left_open(
    how: Examination, reported: Mapping[str, float], found: Mapping[str, float], images: int
) -> Mapping[str, float]:
    """How far apart figures of so many images may be because ``exact`` ran out of time."""
    if "exact" not in how.verifiers:
        return {}
    most = max(reported["undecided"], found.get("undecided", 0))
    counts = dict.fromkeys(("certified", "falsified", "undecided"), most)
    return counts | {"verified_error": 100 * most / images}


def _examination(entry: Mapping[str, Any]) -> Examination:
    given = {field.name: entry[field.name] for field in fields(Examination) if field.name in entry}
    if "verifiers" in given:
        given["verifiers"] = verifiers.parse(",".join(map(str, given["verifiers"])))
    return Examination(**given)


def _number(entry: Mapping[str, Any], figure: str) -> float:
    value: float = entry[figure]
    if not NUMBER.admits(value):
        raise TypeError(f"{figure}: expected {NUMBER.expectation}, found {shown(value)}")
    return value


def _environment(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an evaluation was made with, empty if it did not note it."""
    found = entry.get("environment", {})
    if not isinstance(found, Mapping):
        raise TypeError(f"environment: expected a mapping, found {shown(found)}")
    return found


def _epoch(network: object) -> int:
    """Of a network by the name that an evaluation gave it."""
    epoch = examination.epoch_of_name(network)
    if epoch is None:
        raise ValueError(f"expected a network with its epoch, found {shown(network)}")
    return epoch


def differences(claims: Sequence[Claim], here: Mapping[str, Any]) -> list[str]:
    """In what the environments of claims differ from the one here, each difference once.

    Args:
        claims: of one run.
        here: what :func:`robust_app.environment.describe` says.
    """
    found = (environment.differences(claim.made_with, here) for claim in claims)
    return list(dict.fromkeys(chain.from_iterable(found)))
