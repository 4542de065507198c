"""Several processes over gloo, each started once, for that takes seconds: it runs many checks."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

Checks = Mapping[str, Callable[[int, int], Any]]
"""What a process does, given its rank and their number, by name."""


def reports(checks: Checks, world: int, folder: Path) -> list[dict[str, Any]]:
    """What came out of every check in each of ``world`` processes, which work in the folder."""
    # Importing torch takes longer than all checks together: the fork server does it once.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
    )
    torch.multiprocessing.start_processes(
        _process, (world, str(folder), checks), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _process(rank: int, world: int, folder: str, checks: Checks) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=2),  # processes that part ways would wait for each other
    )
    found = {name: check(rank, world) for name, check in checks.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
