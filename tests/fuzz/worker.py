"""A process that tries the files of a range of numbers, and may die of one of them."""

import faulthandler
import importlib
import sys

import torch

from tests.fuzz import running
from tests.fuzz.catalogue import FORMATS


def main(name: str, seed: int, start: int, stop: int) -> None:
    """Say each number before it is tried, and what became of all in the end."""
    torch.set_num_threads(1)
    faulthandler.enable()
    importlib.import_module("torch._dynamo")  # which shapes without numbers take seconds to import
    form = FORMATS[name]()
    running.run(form, name, seed, range(-3, 0))  # what is imported late, is now
    running.limit_addresses()
    tally = running.run(
        form, name, seed, range(start, stop), lambda number: print(number, flush=True)
    )
    print(tally.as_json())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
