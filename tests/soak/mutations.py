"""Bounds with one small thing wrong, and the tests that are to catch each.

    python -m tests.soak mutations
    python -m tests.soak.mutations   # alone

A mutant that no test catches must be in the table of those that are known to be harmless, with the
reason; else the part ends with an error.
"""

import argparse
import importlib
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.soak import report
from tests.soak.battery import Battery, Outcome
from tests.soak.effort import FULL, QUICK, Effort
from tests.soak.harmless import HARMLESS
from tests.soak.mutants import Mutant, mutants

ROOT = Path(__file__).parents[2]
# The modules whose functions bound something, and the functions that do not.
MODULES: Mapping[str, tuple[str, ...]] = {
    "interval": (),
    "bounds": (),
    "margins": (),
    "rounding": (),
    "certificates": (),
    "plain_networks": (),
    "relaxation": (),
    "pullback": (),
    "slopes": (),
    "fused": ("_ReluBox.backward", "_SplitBySign.backward"),
    "crown_margins": (),
    "tightening": (),
    "crown": (),
    "constraints": (),
    "exact": ("decided", "_misclassified_near", "_misclassified"),
}
TESTS = (
    "bounds",
    "certificates",
    "counterexamples",
    "crown",
    "exact",
    "fused",
    "interval",
    "margins",
    "pullback",
    "relaxation",
    "rounding",
    "slopes",
)


class Unnoticed(Exception):
    """No test tells these mutants from what they were made of."""


def soak(effort: Effort, console: Console, folder: Path) -> None:
    """Try mutants, and write down what became of them.

    Raises:
        Unnoticed: some survived that are not known to be harmless, or one of these was caught.
    """
    began = time.monotonic()
    outcomes = tried(every_mutant()[:: effort.mutants], effort.test_seconds, console)
    found = summary(outcomes)
    found["seconds"] = round(time.monotonic() - began)
    report.save("mutations", report.command("mutations", effort), found, folder)
    console.print(
        f"{len(outcomes)} mutants, {sum(bool(o.by) for o in outcomes)} caught", highlight=False
    )
    check(outcomes)


def every_mutant() -> list[Mutant]:
    """Of all modules."""
    return [
        mutant
        for name, others in MODULES.items()
        for mutant in mutants(
            importlib.import_module(f"robust_app.{name}"), lambda f, others=others: f not in others
        )
    ]


def tried(
    candidates: Sequence[Mutant],
    longest: float,
    console: Console,
    files: Sequence[str] = tuple(f"tests/robust_app/test_{name}.py" for name in TESTS),
) -> list[Outcome]:
    """What becomes of mutants of loaded modules.

    Args:
        candidates: to try.
        longest: seconds of processor time that a test may take to be asked.
        console: for those that survive.
        files: of the tests.
    """
    outcomes: list[Outcome] = []

    def told(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if not outcome.by and identity(outcome.mutant) not in HARMLESS:
            console.print(
                "survived", *identity(outcome.mutant), sep=" | ", highlight=False, markup=False
            )

    battery = Battery(sorted({m.module for m in candidates}), candidates, told, longest)
    paths = [str(ROOT / file) for file in files]
    options = ["-q", "-s", "-p", "no:cacheprovider", "--tb=no", "--no-header", "--no-summary"]
    status = pytest.main([*options, "-c", str(ROOT / "pyproject.toml"), *paths], plugins=[battery])
    if len(outcomes) != len(candidates):
        raise Unnoticed(f"pytest ended with status {status}")
    return outcomes


def identity(mutant: Mutant) -> tuple[str, str, str]:
    """Module, function and change."""
    return mutant.module.removeprefix("robust_app."), mutant.function, mutant.change


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many were caught, by module and by kind, and why the others are harmless."""

    def counts(names: Sequence[str]) -> dict[str, dict[str, int]]:
        every, caught = (
            Counter(names),
            Counter(name for name, outcome in zip(names, outcomes, strict=True) if outcome.by),
        )
        return {name: {"mutants": every[name], "caught": caught[name]} for name in sorted(every)}

    survivors = [identity(outcome.mutant) for outcome in outcomes if not outcome.by]
    return {
        "mutants": len(outcomes),
        "caught": len(outcomes) - len(survivors),
        "by module": counts([identity(outcome.mutant)[0] for outcome in outcomes]),
        "by kind": counts([outcome.mutant.kind for outcome in outcomes]),
        "processor seconds": round(sum(outcome.seconds for outcome in outcomes)),
        "survivors": [
            {
                "module": module,
                "function": function,
                "change": change,
                "harmless": HARMLESS.get((module, function, change), "not known to be"),
            }
            for module, function, change in survivors
        ],
    }


def check(outcomes: Sequence[Outcome]) -> None:
    """See that those that survive are those that are known to be harmless.

    Raises:
        Unnoticed: they are not.
    """
    by = {identity(outcome.mutant): outcome.by for outcome in outcomes}
    unknown = [name for name, test in by.items() if not test and name not in HARMLESS]
    if unknown:
        lines = "\n".join(" | ".join(name) for name in unknown)
        raise Unnoticed(f"{len(unknown)} that no test catches:\n{lines}")
    caught = [f"{' | '.join(name)} by {by[name]}" for name in HARMLESS if by.get(name)]
    if caught:
        raise Unnoticed("listed as harmless, and caught:\n" + "\n".join(caught))


def main(arguments: Sequence[str]) -> None:
    """This part alone."""
    parser = argparse.ArgumentParser(prog="tests.soak.mutations", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few mutants, and short tests")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # and so no threads, which a fork would lose
    soak(QUICK if given.quick else FULL, Console(width=200), given.output.resolve())


if __name__ == "__main__":
    main(sys.argv[1:])
