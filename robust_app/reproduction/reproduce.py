"""``robust-app reproduce``: what a table of the paper needs is run, resumed or looked up."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from robust_app import data, environment, examination, loading, reporting, runner, session
from robust_app.config import Config
from robust_app.data import Dataset
from robust_app.distributed import World
from robust_app.errors import UserError
from robust_app.overrides import differences
from robust_app.reproduction import measurements, plan, report, sheets
from robust_app.reproduction.comparison import Measured
from robust_app.reproduction.measurements import Measurement
from robust_app.reproduction.paper import Row, Table
from robust_app.reproduction.plan import Run, Settings, Task
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer


@dataclasses.dataclass
class Reproduction:
    """Runs and evaluates what rows of a table need, and writes the table after each run.

    Args:
        table: whole; the files that are written are of all its rows.
        asked: with the rows to run and to show.
        settings: of all runs.
        out: folder of the runs and of the table.
        world: the processes that share the training.
        console: of the leading process.
        data_root, download: see :func:`robust_app.data.load`.
        datasets: those loaded so far, by name.
        failures: why a run failed, by its name.
        busy: why a run could not be held, by its name.
    """

    table: Table
    asked: Table
    settings: Settings
    out: Path
    world: World
    console: Console
    data_root: Path | None = None
    download: bool = False
    datasets: dict[str, Dataset] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    busy: dict[str, str] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Do what is left to do, then show the table.

        A run that another process holds is left to it. Where a run fails the others go on.

        Raises:
            UserError: the data are missing, a directory holds another run, or a run failed.
        """
        plan.check_stages(self.asked, self.settings)
        tasks = plan.by_run(plan.tasks(self.asked, self.settings))
        if not tasks:
            methods = ", ".join(dict.fromkeys(row.method for row in self.asked.rows))
            raise UserError(f"--schedule: {self.settings.schedule} has no recipe for {methods}")
        for run in tasks:
            check_config(RunDirectory(self.out / run.name), run.config)
        waiting = {run: todo for run, todo in tasks.items() if not self._complete(todo)}
        for run in waiting:
            self._load(run.config.dataset)  # what is missing is missed now, not in a week
        self._write()
        for run, todo in waiting.items():
            self._train(run)
            if self.world.size == 1:  # else the others would wait, and time out
                self._examine(run, todo)
        if self.world.size > 1 and self.world.leads:
            for run, todo in waiting.items():
                self._examine(run, todo)
        if self.world.leads:
            self._show()
        if self.failures:
            name, reason = next(iter(self.failures.items()))
            raise UserError(f"{len(self.failures)} of {len(tasks)} runs failed; {name}: {reason}")

    def _leader_says(self, yes: bool) -> bool:
        """The leading process's answer, in all processes."""
        answer = torch.tensor(int(yes and self.world.leads), device=self.world.device)
        return bool(self.world.total(answer))

    def _complete(self, tasks: list[Task]) -> bool:
        return self._leader_says(all(measurements.read(self.out, t).complete for t in tasks))

    def _load(self, name: str) -> Dataset:
        if name not in self.datasets:
            with self.world.leader_first():
                loaded = data.load(name, self.data_root, self.download)
            self.datasets[name] = loaded.to(self.world.device)
        return self.datasets[name]

    def _train(self, run: Run) -> None:
        """Begin or resume a run and bring it to its end."""
        directory = RunDirectory(self.out / run.name)
        with ExitStack() as held:
            if self.world.leads:
                self._lock(directory, held)
            if self._leader_says(run.name in self.busy):
                return
            try:
                end = run.config.total_epochs
                trained = session.has_trained(directory, end)  # by all: each can tell of damage
                if not self._leader_says(trained):
                    self._train_locked(run, directory)
            except UserError as error:
                if self.world.size > 1:
                    raise  # the others may be waiting for this one
                self._fail(run, error)

    def _fail(self, run: Run, error: UserError) -> None:
        self.failures[run.name] = str(error)
        reporting.say(self.console, f"{run.name} failed: {error}")

    def _lock(self, directory: RunDirectory, held: ExitStack) -> None:
        """Hold a run's directory, or remember that another process does."""
        try:
            held.enter_context(directory.locked())
        except UserError as error:
            self.busy[directory.path.name] = str(error)
            reporting.say(self.console, f"left out, {error}")

    def _train_locked(self, run: Run, directory: RunDirectory) -> None:
        trainer = Trainer(run.config, self._load(run.config.dataset), self.world)
        runner.train(
            trainer,
            directory,
            self.console,
            data_root=self.data_root,
            stop_after=run.config.total_epochs,
        )

    def _examine(self, run: Run, tasks: list[Task]) -> None:
        """Evaluate a run's networks for each row that has no result yet; write the table."""
        directory = RunDirectory(self.out / run.name)
        if run.name in self.busy or run.name in self.failures:
            return
        with ExitStack() as held:
            self._lock(directory, held)
            if run.name in self.busy:
                return
            try:
                for task in tasks:
                    for network in task.networks:
                        self._measure(directory, task, network)
            except UserError as error:
                self._fail(run, error)
        self._write()

    def _measure(self, directory: RunDirectory, task: Task, network: str) -> None:
        how, config = task.examination, task.run.config
        epoch = measurements.epoch_of(network, config, directory.metrics())
        if epoch is None or examination.find_result(directory.results(), how, epoch):
            return
        dataset = self._load(config.dataset)
        loaded, epoch = loading.load_network(directory, dataset, network)
        name = examination.network_name(network, epoch)
        shown = f"{task.run.name}, {name}, ε = {how.epsilon:.4g}"
        images = how.images or len(dataset.x_test)
        with reporting.evaluating(self.console, shown, images) as on_batch:
            errors = examination.measure(loaded, dataset, how, config.seed, on_batch)
        directory.add_results([examination.entry(name, how, errors, dataset, config.seed)])

    def _write(self) -> None:
        """Write the whole table, as far as it is known."""
        if self.world.leads:
            seeds, world = list(self.settings.seeds) or "of the recipes", self.world
            made_with = environment.describe(world.device, world.size, seeds, self.data_root)
            measured, remarks = self._so_far(self.table)
            report.write(self.table, self.settings, measured, remarks, made_with, self.out)

    def _show(self) -> None:
        """Print the rows that were asked for."""
        measured, remarks = self._so_far(self.asked)
        for sheet in sheets.sheets(self.asked, measured):
            self.console.print(report.as_rich(sheet))
        for line in [*self.table.notes, *remarks]:
            reporting.say(self.console, f"- {line}")
        reporting.say(self.console, f"written: {self.out / self.table.name}.md")

    def _so_far(self, table: Table) -> tuple[Measured, list[str]]:
        """What is measured of a table, and why the rest is not."""
        measured: dict[Row, list[Measurement]] = {}
        others: dict[str, None] = {}
        for task in plan.tasks(table, self.settings):
            try:
                check_config(RunDirectory(self.out / task.run.name), task.run.config)
                found = measurements.read(self.out, task)
            except UserError as error:  # of a row that was not asked for
                others[str(error)] = None
                found = measurements.nothing(task)
            measured.setdefault(task.row, []).append(found)
        remarks = [*sheets.unfinished(measured, self.failures | self.busy), *others]
        without = dict.fromkeys(row.method for row in table.rows if row not in measured)
        if without:
            schedule = self.settings.schedule
            remarks.append(f"the schedule {schedule} has no recipe for {', '.join(without)}")
        return measured, remarks


def check_config(directory: RunDirectory, config: Config) -> None:
    """See that a directory holds no run, or the one that is expected.

    Raises:
        UserError: it holds another; names what differs.
    """
    if not directory.config_file.exists():
        return
    different = differences(directory.config(), config) or ("a fork" if directory.origin() else "")
    if different:
        raise UserError(
            f"{directory.path}: holds another run ({different}); move it away or give another --out"
        )
