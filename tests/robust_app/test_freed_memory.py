import platform
import subprocess
import sys

import pytest

# Large tensors are made and dropped; a page that the system hands out anew is a fault. At first
# the memory grows until the freed pieces fit together.
PROGRAM = """
import resource, torch
from robust_app.freed_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    a = torch.ones(9_000_000)  # 36 MB
    b = a + 1
    c = a * b
    del a
    d = b - c

assert {first}
for _ in range(12):
    step()
before = faults()
for _ in range(3):
    step()
print(faults() - before)
"""


def faults_of_three_steps(first: str) -> int:
    program = PROGRAM.format(first=first)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    default, kept = map(faults_of_three_steps, ["True", "keep_freed_memory()"])
    assert kept < 100
    assert kept < default / 10
