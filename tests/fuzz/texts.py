"""TOML and JSON: recipes, and the files of a run directory."""

import dataclasses
import json
import re
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

from robust_app import curves, data, method_settings, pictures, recipes
from robust_app.config import Config
from robust_app.events import Events
from robust_app.examination import Examination
from robust_app.metrics import SHOWN, best_epoch, values
from robust_app.overrides import override, with_epochs
from robust_app.plot import read as read_metrics
from robust_app.reporting import Silent
from robust_app.reproduction import measurements, paper
from robust_app.reproduction.plan import Settings, tasks
from robust_app.run_directory import RunDirectory
from robust_app.training import Trainer
from tests.fuzz.formats import Format
from tests.fuzz.mutation import NUMBERS, Random, mutate_bytes, mutate_value
from tests.fuzz.tensors import CONFIG, DIGITS
from tests.robust_app.runs import ALONE

PATIENCE = 20
"""Steps of an attack up to which it is run: a file may ask for any number of them."""

DRAWN = 50
"""One in so many metrics is drawn: that takes a second."""

LITERALS = (
    *("1e999", "-1e999", "nan", "inf", "0x" + "f" * 6000, "9" * 5000, "9" * 4000, "-0.0", "1e-400"),
    *("1979-05-27T07:32:00Z", "07:32:00", "1_000", "0b1", "'\\u0000'", '"\\ud800"', '"\\n"'),
    *("[" * depth + "]" * depth for depth in (60, 400, 900, 100_000)),
    *("{a=" * depth + "1" + "}" * depth for depth in (60, 400, 100_000)),
    "[" + "0, " * 50_000 + "]",
    '"' + "x" * 200_000 + '"',
)
"""Values as text, which TOML or JSON, or neither, may know."""


SMALLER = [number for number in NUMBERS if isinstance(number, float) or abs(number) < 10**50]
"""Those that Python writes in decimal digits."""


def mutate_toml(text: str, random: Random) -> str:
    """Lines of ``key = value`` with other values, keys, or none."""
    lines = text.splitlines()
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(lines))
        key, _, value = lines[at].partition(" = ")
        kind = random.randrange(10)
        if kind == 0:
            lines.append(lines[at])
        elif kind == 1:
            names = (
                "",
                f"{key}x",
                f'"{"x" * 100_000}"',
                '"a\\nb"',
                f"[{key}]",
                f"{key}.a",
                "[[a]]",
            )
            lines[at] = f"{random.choice(names)} = {value}"
        elif kind == 2:
            lines[at] = f"{key} = {random.choice(lines).partition(' = ')[2]}"
        elif kind == 3:
            lines[at] = ".".join([key] * random.choice((2, 500, 20_000))) + " = 1"
        elif kind == 4:
            del lines[at]
        elif kind < 7:
            lines[at] = f"{key} = {random.choice(LITERALS)}"
        else:
            number = repr(random.choice((*SMALLER, random.uniform(0, 3))))[:4400].lower()
            lines[at] = f"{key} = {random.choice((number, f'[{number}, 0.5]'))}"
        if not lines:
            break
    return "\n".join(lines) + "\n"


def _toml(text: str, random: Random) -> bytes:
    data = mutate_toml(text, random) if random.random() < 0.8 else text
    encoded = data.encode("utf-8", "surrogatepass")
    return mutate_bytes(encoded, random) if data is text else encoded


def go_on(config: Config) -> None:
    """Load its images if it names a file, make its trainer for some digits, train an epoch."""
    if config.dataset != CONFIG.dataset:
        data.load(config.dataset, None)
    with_epochs(config, 7)
    Examination.of(config)
    method_settings.check(config)
    assert Config.from_mapping(dataclasses.asdict(config)) == config
    override(config, ["seed=1"])
    trainer = Trainer(config, DIGITS, ALONE)
    if config.attack_steps <= PATIENCE:
        trainer.train_epoch(Silent())


def config() -> Format:
    """``config.toml`` of a run directory."""
    go_on(CONFIG)  # what is imported late, is now
    texts = [
        text.to_toml() for text in (CONFIG, dataclasses.replace(CONFIG, augment=True, stages=0))
    ]

    def write(random: Random, folder: Path) -> None:
        (folder / "config.toml").write_bytes(_toml(random.choice(texts), random))

    return Format(write, lambda folder: go_on(RunDirectory(folder).config()))


def recipe() -> Format:
    """A file for ``train --recipe``."""
    go_on(CONFIG)  # what is imported late, is now
    text = f'description = "mine"\n{CONFIG.to_toml()}'

    def write(random: Random, folder: Path) -> None:
        (folder / "mine.toml").write_bytes(_toml(text, random))

    def read(folder: Path) -> None:
        path = folder / "mine.toml"
        loaded = recipes.load(path)
        recipes.description(path)
        go_on(loaded)

    return Format(write, read)


def mutate_json(value: Any, random: Random, lines: bool = False) -> bytes:
    """JSON, or JSON lines, of a damaged value; or damaged JSON."""
    if random.random() < 0.25:
        return mutate_bytes(_json(value, lines).encode(), random)
    if random.random() < 0.3:
        text = _json(value, lines)
        numbers = [found.span() for found in re.finditer(r"(?<=: )[^,}\]]+", text)]
        start, end = random.choice(numbers)
        literals = (*LITERALS, *("{" + '"a":{' * depth + "}" * depth for depth in (400, 100_000)))
        return (text[:start] + random.choice(literals) + text[end:]).encode()
    changed = mutate_value(value, random)
    if not lines or not isinstance(changed, list):
        return _json(changed, False).encode()
    return _json(changed, True).encode()


def _json(value: Any, lines: bool) -> str:
    try:
        if lines:
            return "".join(json.dumps(entry) + "\n" for entry in value)
        return json.dumps(value)
    except (RecursionError, ValueError):  # of an integer of too many digits
        return "[" * 100_000


def metrics() -> Format:
    """``metrics.jsonl``, which is plotted and from which a run goes on."""
    measured = {metric.key: 0.5 for metric in SHOWN} | {"seconds": 1.0, "stage": 0, "phase": "main"}
    value = [{"epoch": number, **measured} for number in range(1, 4)]
    value.append({**value[0], "epoch": 4, "verified_error": None, "standard_error": None})
    task = _task()

    def write(random: Random, folder: Path) -> None:
        run = folder / task.run.name
        run.mkdir()
        (run / "config.toml").write_text(CONFIG.to_toml(), encoding="utf-8")
        (run / "metrics.jsonl").write_bytes(mutate_json(value, random, lines=True))

    def read(folder: Path) -> None:
        directory = RunDirectory(folder / task.run.name)
        found = directory.metrics()
        best_epoch(found)
        directory.write_metrics(found)
        measurements.read(folder, task)
        with closing(Events(directory)):
            pass
        shown = read_metrics(directory.path)
        if zlib.crc32(directory.metrics_file.read_bytes()) % DRAWN == 0:
            pictures.save(curves.figure({"run": shown}), [folder / "curves.png"])
        for metric in SHOWN:
            values(found, metric.key)

    return Format(write, read)


def environment() -> Format:
    """``environment.json``, which says where the data are."""
    made = {"device": "cpu", "data_root": "/data", "packages": {"torch": "2"}, "command": ["a"]}
    value = [made, made | {"data_root": None}]
    task = _task()

    def write(random: Random, folder: Path) -> None:
        run = folder / task.run.name
        run.mkdir()
        (run / "environment.json").write_bytes(mutate_json(value, random))

    def read(folder: Path) -> None:
        directory = RunDirectory(folder / task.run.name)
        root = directory.data_root()
        measurements.read(folder, task)
        directory.add_environment(made)
        data.load("mnist", root)

    return Format(write, read)


def results() -> Format:
    """``results.json``, which ``reproduce`` makes its sheets of."""
    task = _task()
    shares = {"ibp": {"examples": 4, "certified": 1, "falsified": 0, "seconds": 0.1}}
    errors = {"examples": 10, "standard_error": 1.0, "verified_error": 3.0, "pgd_error": 2.0}
    how = dataclasses.asdict(task.examination)
    value = [
        {"network": f"last (epoch {task.run.config.total_epochs})", **how, **errors}
        | {"shares": shares}
    ]
    lines = [
        {"epoch": epoch, "standard_error": 1.0, "verified_error": 2.0, "seconds": 1.0}
        for epoch in range(1, task.run.config.total_epochs + 1)
    ]
    ending = "".join(json.dumps(line) + "\n" for line in lines)

    def write(random: Random, folder: Path) -> None:
        run = folder / task.run.name
        run.mkdir()
        (run / "metrics.jsonl").write_text(ending, encoding="utf-8")
        (run / "results.json").write_bytes(mutate_json(value, random))

    def read(folder: Path) -> None:
        directory = RunDirectory(folder / task.run.name)
        measured = measurements.read(folder, task)
        for found in measured.errors.values():
            [f"{error:.2f}" for error in found.values()]
        directory.add_results(value)

    return Format(write, read)


def _task() -> Any:
    task = tasks(paper.find("table-4"), Settings(epochs_scale=0.1))[0]
    return dataclasses.replace(task, networks=("last",))
