"""Every speed that the documentation speaks of, in one table: ``make bench``.

Each section compares something with something else beside it in the same process. What is
measured is saved after every row, so that a run that is stopped keeps what it has; a section that
is measured anew replaces its own rows only.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from robust_app import environment
from robust_app.freed_memory import keep_freed_memory
from tests.benchmarks import aggregation, bounds, epoch, execution, figure, joint, memory, processes
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
ON_GPU: Mapping[str, Callable[[Effort], Iterator[Row]]] = {
    "execution": execution.beside_eager_float32,
    "compile": execution.beside_eager_tf32,
    **{name: SECTIONS[name] for name in ("joint step", "TorchJD", "bounds")},
}


def main(arguments: Sequence[str]) -> None:
    """Run the sections asked for, print the table and write it."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small problems, seconds in all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: on a GPU")
    parser.add_argument("--only", nargs="+", choices={**SECTIONS, **ON_GPU}, metavar="SECTION")
    parser.add_argument("--threads", type=int, help="of torch; its own default if left out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if (given.quick or given.device == "cuda") and given.output == RESULTS:
        parser.error("--quick and --device cuda measure other things: give them their own --output")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda needs a GPU, found none")
    sections = SECTIONS if given.device == "cpu" else ON_GPU
    if not sections.keys() >= {*(given.only or sections)}:
        parser.error(f"--only: --device {given.device} has the sections {', '.join(sections)}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    effort, console = QUICK if given.quick else FULL, Console()
    keep_freed_memory()  # as the command line does
    report, facts = Report.load(given.output), describe(arguments, torch.device(given.device))
    for name in given.only or sections:
        console.print(f"{name} …", highlight=False)
        report.begin(name, order=sections)
        # What takes no device is made on this one.
        with nullcontext() if name in ("execution", "compile") else torch.device(given.device):
            for row in sections[name](effort):
                report.add(facts, row)
                report.save(given.output)
                console.print("  ", *filter(None, row.cells()[1:]), sep="  ", highlight=False)
        if name == "aggregation":
            figure.draw(report.sections[name]["rows"], given.output)
    console.print(table(report.rows()))


def describe(arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    found = environment.describe(device, processes=1, seed=0, data_root=None)
    gpu = {"GPU": found["device"], "CUDA": found["cuda"]} if device.type == "cuda" else {}
    return {
        **gpu,
        "processor": processor(),
        "platform": found["platform"],
        "threads": found["threads"],
        "torch": torch.__version__,
        "Python": found["python"],
        "torchjd": version("torchjd") if find_spec("torchjd") else None,
        "commit": found["commit"],
        "seed": found["seed"],
        "command": shlex.join(["python", "-m", "tests.benchmarks", *arguments]),
    }


def processor() -> str:
    """The name of the processor and how many of its cores this process may use."""
    return f"{environment.processor()}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main(sys.argv[1:])
