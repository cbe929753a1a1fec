"""Freed memory is used again without asking the system for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from halfstep.cli.app import keep_freed_memory

keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for round in range(6):
    before = faults()
    some = [torch.ones(10_000_000) for _ in range(4)]
    del some
print(faults() - before)
"""

PAGES = 4 * 40_000_000 // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_pages_of_freed_tensors_are_not_cleared_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < PAGES / 100
