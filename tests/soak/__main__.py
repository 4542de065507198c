"""What long use, and the worst of luck, do to a run: ``make soak``.

    python -m tests.soak             # all parts
    python -m tests.soak kills       # one of them
    python -m tests.soak kills --quick --output DIR

Each part ends with an error at the first thing that is lost or wrong, and writes what it has tried
into docs/results/reliability-PART.json.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from robust_app.interruption import stoppable
from tests.soak import adversity, certificates, kills, mutations, optimizer, ranks, writes
from tests.soak.effort import FULL, QUICK, Effort

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PARTS: Mapping[str, Callable[[Effort, Console, Path], None]] = {
    "certificates": certificates.soak,
    "mutations": mutations.soak,
    "kills": kills.soak,
    "writes": writes.soak,
    "adversity": adversity.soak,
    "ranks": ranks.soak,
    "optimizer": optimizer.soak,
}


def main(arguments: Sequence[str]) -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(
        prog="tests.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="few of each, seconds in all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is named {', '.join(sorted(unknown))}")
    if given.quick and given.output == RESULTS:
        parser.error("--quick tries less: give it an --output of its own")
    torch.set_num_threads(1)  # and so no threads, which a fork would lose
    console = Console()
    with stoppable():  # so that children are ended, too
        for name in given.parts or PARTS:
            console.print(f"{name} …", highlight=False)
            PARTS[name](QUICK if given.quick else FULL, console, given.output.resolve())


if __name__ == "__main__":
    main(sys.argv[1:])
