from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from gradshield_fast.heap import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("none")
    sys.exit()

def batch():
    kept = [torch.ones(1 << 20) for _ in range(40)]  # 4 MiB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

batch()
before = faults()
for _ in range(5):
    batch()
print(faults() - before)
"""


def faults(how: str) -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_freed_memory_is_used_again_without_new_pages() -> None:
    kept = faults("keep")
    if kept == "none":
        pytest.skip("this system's C library is not glibc")
    pages = 5 * 40 * (4 << 20) // 4096
    assert int(kept) < pages / 20
