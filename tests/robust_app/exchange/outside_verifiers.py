"""Verifiers from elsewhere on an exported folder, beside the verdicts that came with it.

``python -m tests.robust_app.exchange.outside_verifiers VERIFIER FOLDER`` prints a line for each
property, then the counts. The verifier's command is to be on the path or beside this Python.
"""

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

COMMANDS = {
    "marabou": "Marabou {model} {prop} --timeout {seconds} --verbosity 0",
    "vibecheck": "vibecheck verify {prop} --network N={model} --timeout {seconds}",
}
ANSWERS = {"unsat": "certified", "sat": "falsified"}


def command(verifier: str) -> str | None:
    """Where the verifier's program lies, if it is installed."""
    places = os.environ["PATH"], sysconfig.get_path("scripts")
    return shutil.which(COMMANDS[verifier].split()[0], path=os.pathsep.join(places))


def verdict(verifier: str, folder: Path, model: str, prop: str, seconds: str) -> str:
    """What the verifier says of a property; undecided also where it gives up with an error."""
    _, *arguments = COMMANDS[verifier].split()
    filled = [part.format(model=model, prop=prop, seconds=seconds) for part in arguments]
    # Not checked: vibecheck's status is 1 when it has found a counterexample.
    done = subprocess.run(
        [str(command(verifier)), *filled], cwd=folder, check=False, text=True, capture_output=True
    )
    answers = [
        ANSWERS[line.strip()] for line in done.stdout.splitlines() if line.strip() in ANSWERS
    ]
    return answers[0] if answers else "undecided"


def comparisons(verifier: str, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each property with this package's verdict and the verifier's."""
    with (folder / "verdicts.csv").open() as file:
        ours = {row["property"]: row["verdict"] for row in csv.DictReader(file)}
    with (folder / "instances.csv").open() as file:
        for model, prop, seconds in csv.reader(file):
            yield prop, ours[prop], verdict(verifier, folder, model, prop, seconds)


def main(verifier: str, folder: str) -> None:
    """Print what a verifier says of a folder."""
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for prop, ours, theirs in comparisons(verifier, Path(folder)):
        seconds, started = time.perf_counter() - started, time.perf_counter()
        print(f"{prop}: here {ours}, {verifier} {theirs}, {seconds:.1f} s", flush=True)
        counts[f"here {ours}, there {theirs}"] += 1
    print("; ".join(f"{count} {what}" for what, count in sorted(counts.items())))


if __name__ == "__main__":
    main(*sys.argv[1:])
