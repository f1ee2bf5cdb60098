"""Memory that was freed is given back, large arrays one by one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

KEPT = """
import sys
from phi4edge.core.memory import give_large_arrays_back, rss_bytes
import torch

if sys.argv[1] == "asked":
    give_large_arrays_back()
size = 16 * 2**20 // 4
torch.ones(size)  # glibc sees that such arrays are freed, and keeps the next ones
before, small = rss_bytes(), []
for _ in range(12):
    large = torch.ones(size)
    small.append(large[:4096].clone())
    del large
    small.append(torch.ones(1 << 16))
print((rss_bytes() - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the option is glibc's")
def test_small_tensors_that_outlive_large_ones_do_not_hold_their_memory() -> None:
    grown = {}
    for how in ("asked", "not asked"):
        ran = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True)
        grown[how] = int(ran.stdout)
    assert grown["asked"] < 8, grown  # twelve times a quarter of a MiB and 16 KiB were kept on purpose
    assert grown["not asked"] > grown["asked"] + 8, grown  # else this says nothing
