"""From the rows of a table of the paper to training runs and evaluations; nothing is run here."""

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from robust_app import models, overrides, recipes
from robust_app.config import Config
from robust_app.errors import UserError, shown, unknown
from robust_app.examination import Examination
from robust_app.reproduction import paper
from robust_app.reproduction.paper import Row, Table


@dataclass(frozen=True)
class Settings:
    """What may differ from the paper, for every row alike.

    Args:
        schedule: of the recipes: ``"paper"``, ``"authors"`` or ``"short"``.
        epochs_scale: factor on the length of each run's whole schedule, above 0.
        seeds: one run each; the recipe's own where empty.
        stages: layer-wise stages after each run; None for the recipe's, or for as many as the
            network has in a table that is about them.

    Raises:
        UserError: a value is unknown or out of its range.
    """

    schedule: str = "paper"
    epochs_scale: float = 1.0
    seeds: tuple[int, ...] = ()
    stages: int | None = None

    def __post_init__(self) -> None:
        datasets = {row.dataset for name in paper.names() for row in paper.find(name).rows}
        families = [family for family in recipes.families() if family.name in datasets]
        known = list(dict.fromkeys(c for f in families for c in f.choices("schedule")))
        if self.schedule not in known:
            raise unknown("schedule", self.schedule, known)
        if not 0 < self.epochs_scale <= 1000:
            raise UserError(
                f"--epochs-scale: expected a number above 0 and at most 1000, "
                f"found {self.epochs_scale:g}"
            )


def parse_seeds(texts: Iterable[str]) -> tuple[int, ...]:
    """Seeds as the command line has them.

    Raises:
        UserError: one is not an integer of at least 0, of 64 bits, or there twice.

    >>> parse_seeds(["0", "1"])
    (0, 1)
    """
    found = tuple(texts)
    told = shown(",".join(found))
    most = len(str(sys.maxsize))  # digits; a number of very many cannot be read
    if not all(text.isascii() and text.isdigit() and len(text) <= most for text in found):
        raise UserError(f"--seeds: expected integers of at least 0, of 64 bits, found {told}")
    seeds = tuple(map(int, found))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: expected different ones, found {told}")
    return seeds


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        name: of its directory; runs of different settings have different names.
        recipe: that the configuration is made from.
        config: complete.
    """

    name: str
    recipe: str
    config: Config


@dataclass(frozen=True)
class Task:
    """A row of a table, with one seed.

    Args:
        row: of the table.
        run: that trains its network; rows may share it.
        examination: how the run's networks are evaluated for this row.
        networks: which ones: names of :func:`~robust_app.loading.load_network`.
    """

    row: Row
    run: Run
    examination: Examination
    networks: tuple[str, ...]


def tasks(table: Table, settings: Settings) -> list[Task]:
    """What to do for each row and seed; nothing for a row that the schedule has no recipe of.

    The same row has the same tasks whichever other rows the table has, so that machines which do
    different rows agree.

    >>> from robust_app.reproduction import paper
    >>> first = tasks(paper.find("table-4"), Settings(epochs_scale=0.1))[0]
    >>> first.run.name, first.run.config.epochs, first.examination.epsilon
    ('mnist-dm-small-crown-ibp-0.1-paper-x0.1-seed0', 10, 0.1)
    """
    return [task for row in table.rows for task in _tasks_of(table, row, settings)]


def check_stages(table: Table, settings: Settings) -> None:
    """See that each network of a table has as many layers as there are to be stages.

    Raises:
        UserError: one has fewer.
    """
    for model in dict.fromkeys(row.model for row in table.rows):
        if (settings.stages or 0) > _all_stages(model):
            raise UserError(
                f"--stages: expected at most {_all_stages(model)} for {model}, "
                f"found {settings.stages}"
            )


def by_run(found: Iterable[Task]) -> dict[Run, list[Task]]:
    """The tasks of each run, in the order of the first task of each."""
    grouped: dict[Run, list[Task]] = {}
    for task in found:
        grouped.setdefault(task.run, []).append(task)
    return grouped


def shared_radius(row: Row, schedule: str) -> str | None:
    """The radius whose recipe trains the row's network; None if there is no recipe.

    Recipes that differ in nothing but the radius evaluated at train the same network, but for
    what "best" means; then it is the largest one.

    >>> shared_radius(Row("mnist", "0.2", "advibp", "dm-small"), "paper")
    '0.4'
    >>> shared_radius(Row("mnist", "0.1", "advibp", "dm-small"), "paper")
    '0.1'
    """
    [family] = [family for family in recipes.families() if family.name == row.dataset]
    found = {
        epsilon: _load(name)
        for epsilon in family.choices("epsilon")
        if (name := _recipe(dataclasses.replace(row, epsilon=epsilon), schedule)) in _known()
    }
    if row.epsilon not in found:
        return None
    alike = [epsilon for epsilon in found if _trains(found[epsilon]) == _trains(found[row.epsilon])]
    return max(alike, key=lambda epsilon: found[epsilon].evaluation_epsilon)


def _tasks_of(table: Table, row: Row, settings: Settings) -> list[Task]:
    radius = shared_radius(row, settings.schedule)
    if radius is None:
        return []
    own = _load(_recipe(row, settings.schedule))
    how = dataclasses.replace(Examination.of(own), verifiers=row.verifiers, images=row.images)
    name = _recipe(dataclasses.replace(row, epsilon=radius), settings.schedule)
    recipe = _load(name)
    config = _scaled(recipe, settings.epochs_scale)
    by_stage = "stages" in table.networks
    stages = settings.stages
    if stages is None and by_stage:
        stages = _all_stages(row.model)
    if stages is not None:
        config = dataclasses.replace(config, stages=stages)
    networks = table.networks
    if by_stage:
        networks = tuple(f"stage-{stage}" for stage in range(config.stages + 1))
    runs = [
        Run(_run_name(row, radius, settings, config.stages, seed), name, _seeded(config, seed))
        for seed in settings.seeds or (recipe.seed,)
    ]
    return [Task(row, run, how, networks) for run in runs]


@cache
def _known() -> frozenset[str]:
    return frozenset(recipes.names())


@cache
def _load(name: str) -> Config:
    return recipes.load(name)


def _recipe(row: Row, schedule: str) -> str:
    return f"{row.dataset}-{row.model}-{row.epsilon}-{row.method}-{schedule}"


def _run_name(row: Row, radius: str, settings: Settings, stages: int, seed: int) -> str:
    parts = [row.dataset, row.model, row.method, radius, settings.schedule]
    if settings.epochs_scale != 1:
        parts.append(f"x{settings.epochs_scale:.12g}")
    if stages:
        parts.append(f"stages{stages}")
    return "-".join([*parts, f"seed{seed}"])


def _trains(config: Config) -> Config:
    """The config less what only the evaluation depends on."""
    return dataclasses.replace(config, evaluation_epsilon=0.0)


def _scaled(config: Config, scale: float) -> Config:
    return overrides.with_epochs(config, max(1, round(config.epochs * scale)))


def _seeded(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, seed=seed)


def _all_stages(model: str) -> int:
    """As many stages as leave the network's last linear layer to train."""
    architecture = models.MODELS[model]
    return len(architecture.convolutions) + len(architecture.dense)
