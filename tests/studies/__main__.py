"""What the weights of two losses do to a certified network: fronts and ablations.

    python -m tests.studies ablations --data-root DIR --runs RUNS
    python -m tests.studies fronts --data-root DIR --runs RUNS  # from the network of RUNS/start

A run lies in a directory of its own under RUNS. What is done is not done again, what is half done
is resumed, and what another process holds is left to it: several processes may share the work. The
figures of all runs that are done are written into docs/results after each of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from robust_app import data, environment, recipes
from robust_app.freed_memory import keep_freed_memory
from robust_app.overrides import override, with_epochs
from tests.studies import report
from tests.studies.running import Setup, carry_out, row
from tests.studies.studies import STUDIES, Study

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def main(arguments: Sequence[str]) -> None:
    """Carry out a study and write what it found."""
    parser = argparse.ArgumentParser(prog="tests.studies", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data-root", type=Path, help="of mnist, as torchvision's")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--seeds", type=int, nargs="+", help="the study's own by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variations; all by default")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of each run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    study = STUDIES[given.study]
    unknown = set(given.only or ()) - {variation.name for variation in study.variations}
    if unknown:
        parser.error(f"--only: no variation of {study.name} is named {', '.join(sorted(unknown))}")
    keep_freed_memory()  # as the command line does
    config = with_epochs(recipes.load(study.recipe), study.epochs)
    config = override(config, [*study.settings, *given.set])
    setup = Setup(
        config,
        study.epsilons,
        data.load(config.dataset, given.data_root),
        given.data_root,
        given.runs / given.study,
        None if study.start is None else given.runs / study.start,
        study.shared_epochs,
    )
    facts = environment.describe(torch.device("cpu"), 1, config.seed, None)
    facts["command"] = f"python -m tests.studies {study.name} --data-root DIR --runs RUNS"
    work(study, setup, given.seeds or study.seeds, given.only, given.output, facts)


def work(
    study: Study,
    setup: Setup,
    seeds: Sequence[int],
    only: Sequence[str] | None,
    output: Path,
    facts: dict[str, object],
) -> None:
    """What is asked for, seed by seed; after each run the figures of all that is done."""
    rows: list[report.Row] = []
    console, asked = Console(), [v for v in study.variations if not only or v.name in only]
    for seed in seeds:
        for variation in asked:
            carry_out(setup, variation, seed, console)
            found = [
                row(setup, variation, seed)
                for seed in sorted({*study.seeds, *seeds})
                for variation in study.variations
            ]
            rows = [each for each in found if each is not None]
            if rows:
                report.save(study.name, facts, rows, output)
    if rows:
        console.print(report.table(rows), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
