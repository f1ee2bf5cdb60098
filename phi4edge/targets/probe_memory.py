"""How fast this machine's memory is, measured: a process of its own, so that a gigabyte is not held by the caller.

``python -m phi4edge.targets.probe_memory THREADS`` prints one JSON object. Two kinds of traffic are timed, each thread
on buffers of its own, all of them together far larger than the caches, and the best of ``ROUNDS`` counts, as in
STREAM: what a machine can do is the question, and other programs only ever make it slower.

* **read**: s = Σ aᵢ·aᵢ, one buffer read and nothing written. This is what decoding does with the weights.
* **triad**: a = b + q·c, as STREAM has it, counted as STREAM counts it: two buffers read and one written. (A store
  that misses first reads its line, so the bus carries a third more; decoding does not write, and it is given for
  comparison with published figures.)
"""

from __future__ import annotations

__all__ = ["ROUNDS", "buffer_bytes", "last_level_cache", "measure_memory"]

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

ROUNDS = 10
SMALLEST = 256 << 20  # bytes of a buffer, all threads together
TIMES_CACHE = 8  # a buffer is as many times the last-level cache
PIECE = 1 << 16  # float32 values of one step of the triad: its two passes over a piece meet in the second-level cache
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache(caches: Path = _CACHES) -> int | None:
    """Bytes of the largest cache that a core sees; None where the system does not say."""
    sizes = []
    for file in caches.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=None)


def buffer_bytes(cache: int | None, available: int) -> int:
    """Size of one buffer: far above the cache, and three of them within a half of the memory at hand."""
    return min(max(SMALLEST, TIMES_CACHE * (cache or 0)), available // 6)


def measure_memory(threads: int, nbytes: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Bandwidth of ``threads`` threads over buffers of ``nbytes`` each in all.

    ``read`` and ``triad`` hold one value a round, 10⁹ bytes a second, in the order of measuring.
    """
    import numpy as np

    count = nbytes // threads // 4
    a, b, c = ([np.full(count, value, dtype=np.float32) for _ in range(threads)] for value in (0.0, 1.0, 2.0))
    q = np.float32(3.0)

    def read(i: int) -> None:
        np.dot(b[i], b[i])

    def triad(i: int) -> None:
        for start in range(0, count, PIECE):
            part = slice(start, start + PIECE)
            np.multiply(c[i][part], q, out=a[i][part])
            np.add(a[i][part], b[i][part], out=a[i][part])

    with ThreadPoolExecutor(threads) as pool:

        def rate(work: Callable[[int], None], moved: int) -> float:
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            return moved * count * 4 * threads / (time.perf_counter() - start) / 1e9

        for work in (read, triad):  # threads started, pages touched
            rate(work, 1)
        return {"read": [rate(read, 1) for _ in range(rounds)], "triad": [rate(triad, 3) for _ in range(rounds)]}


def main() -> int:
    """Print the measurement; exit status 1 with ``error`` in it when there is no memory for it."""
    threads, cache = int(sys.argv[1]), last_level_cache()
    nbytes = buffer_bytes(cache, psutil.virtual_memory().available)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    try:
        found = measure_memory(threads, nbytes)
    except MemoryError:
        print(json.dumps({"error": f"no room for three buffers of {nbytes / 1e6:.0f} MB"}))  # noqa: T201
        return 1
    print(json.dumps(found | {"threads": threads, "buffer_bytes": nbytes, "cache_bytes": cache, "load": load}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
