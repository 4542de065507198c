"""The true command line of torchrun, one of whose processes is killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from robust_app.run_directory import RunDirectory
from tests.soak.kills import RUN
from tests.soak.soundness import check, differences, epochs_done

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
PATIENCE = 600.0


@contextmanager
def started(size: int, place: Path, log: Path):
    """A run of so many processes; ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *TORCHRUN,
                "--nproc-per-node",
                str(size),
                "-m",
                "robust_app",
                *RUN,
                "--run-dir",
                place,
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.terminate()  # which it passes on to its workers
        process.wait(PATIENCE)


def workers_of(process: int) -> list[int]:
    threads = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in threads for child in file.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_torchrun_starts_all_again_and_ends_in_the_same_bits(size, tmp_path):
    unbroken, killed, log = tmp_path / "unbroken", tmp_path / "killed", tmp_path / "log"
    with started(size, unbroken, log) as process:
        assert process.wait(PATIENCE) == 0, log.read_text()
    with started(size, killed, log) as process:
        until = time.monotonic() + PATIENCE
        while epochs_done(killed) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        workers = workers_of(process.pid)
        assert len(workers) == size
        os.kill(workers[-1], signal.SIGKILL)
        assert process.wait(PATIENCE) == 0, log.read_text()
    assert len(RunDirectory(killed).environments()) == 2  # it was started again
    check(killed)
    assert not differences(unbroken, killed)
