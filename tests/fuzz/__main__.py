"""Damaged files of every format that the program reads: ``make fuzz``.

    python -m tests.fuzz [FORMAT ...] --count N --seed S --output FOLDER
    python -m tests.fuzz onnx --seed S --number 4711   # one file again, here, with its traceback

A file is to be refused in one line, or to be valid still and gone on with. Whatever else happens is
a failure, and ends the command with status 1: a traceback, a warning, a payload that is executed, a
file that takes too long or too much memory, a process that dies.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.fuzz import report
from tests.fuzz.catalogue import FORMATS
from tests.fuzz.running import Tally, attempt, make, run_apart

RESULTS = Path(__file__).parents[2] / "docs" / "results"
COUNT = 10_000


def main(arguments: Sequence[str]) -> int:
    """Damage and read the files asked for; print and save what became of them."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--count", type=int, default=COUNT, help="of files of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="of one file to be tried again in this process")
    parser.add_argument("--output", type=Path, help="else docs/results, or of a part a new folder")
    given = parser.parse_args(arguments)
    names = given.formats or list(FORMATS)
    if set(names) - FORMATS.keys():
        parser.error(f"there are the formats {', '.join(FORMATS)}")
    if given.number is not None:
        if len(names) > 1:
            parser.error("--number: name one format")
        again(names[0], given.seed, given.number)
        return 0
    whole = given.count == COUNT and not given.formats
    output = given.output or (RESULTS if whole else Path(tempfile.mkdtemp(prefix="fuzz-")))
    console, tallies = Console(), dict[str, Tally]()
    facts = report.facts(" ".join(["python -m tests.fuzz", *arguments]), given.seed)
    for name in names:
        tallies[name] = run_apart(name, given.seed, range(given.count))
        report.save(facts, tallies, output)
        for number, why in tallies[name].failed.items():
            console.print(f"{name} {number}: {why}", highlight=False, markup=False)
    console.print(report.table(tallies))
    console.print(f"written to {output}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(tally.failed for tally in tallies.values()) else 0


def again(name: str, seed: int, number: int) -> None:
    """One file, which is kept; the traceback goes to whoever calls."""
    form, top = FORMATS[name](), Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{number}-"))
    folder, here = top / "files", top / "here"
    folder.mkdir()
    here.mkdir()
    print(f"the files lie in {folder}", flush=True)
    with contextlib.chdir(here):
        make(form, name, seed, number, folder)
        refused = attempt(form, folder)
    print("loaded" if refused is None else f"refused by {refused}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
