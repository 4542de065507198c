"""Every speed that the documentation speaks of, in one table: ``make bench``.

Each section compares something with something else beside it in the same process. What is
measured is saved after every row, so that a run that is stopped keeps what it has; a section that
is measured anew replaces its own rows only.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from robust_app import environment
from robust_app.freed_memory import keep_freed_memory
from tests.benchmarks import aggregation, bounds, epoch, figure, joint, memory, processes
from tests.benchmarks.effort import FULL, QUICK, Effort
from tests.benchmarks.report import Report, Row, table

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SECTIONS: Mapping[str, Callable[[Effort], Iterator[Row]]] = {
    "joint step": joint.beside_the_weighted_sum,
    "TorchJD": joint.beside_torchjd,
    "roofline": joint.beside_the_roofline,
    "bounds": bounds.beside_the_plain_loss,
    "memory": memory.beside_the_largest_loss,
    "epoch": epoch.beside_the_steps,
    "aggregation": aggregation.over_parameters,
    "processes": processes.over_processes,
}


def main(arguments: Sequence[str]) -> None:
    """Run the sections asked for, print the table and write it."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small problems, seconds in all")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=SECTIONS)
    parser.add_argument("--threads", type=int, help="of torch; its own default if left out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if given.quick and given.output == RESULTS:
        parser.error("--quick measures other problems: give it an --output of its own")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    effort, console = QUICK if given.quick else FULL, Console()
    keep_freed_memory()  # as the command line does
    report, facts = Report.load(given.output), describe(arguments)
    for name in given.only:
        console.print(f"{name} …", highlight=False)
        report.begin(name, order=SECTIONS)
        for row in SECTIONS[name](effort):
            report.add(facts, row)
            report.save(given.output)
            console.print("  ", *filter(None, row.cells()[1:]), sep="  ", highlight=False)
        if name == "aggregation":
            figure.draw(report.sections[name]["rows"], given.output)
    console.print(table(report.rows()))


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """What the figures depend on."""
    found = environment.describe(torch.device("cpu"), processes=1, seed=0, data_root=None)
    return {
        "processor": processor(),
        "platform": found["platform"],
        "threads": found["threads"],
        "torch": torch.__version__,
        "Python": found["python"],
        "torchjd": version("torchjd"),
        "commit": found["commit"],
        "seed": found["seed"],
        "command": " ".join(["python -m tests.benchmarks", *arguments]),
    }


def processor() -> str:
    """The name of the processor and how many of its cores this process may use."""
    return f"{environment.processor()}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main(sys.argv[1:])
