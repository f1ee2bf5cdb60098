"""How much of a linear the guard computes on the samples kept aside.

It compares two roundings of the same weight, each with an error that thousands of rows share in. A thousand of them,
spread evenly (over queries, keys and values, gates and ups alike), tell which is the larger; all of them took a fifth
of the time at low effort on Phi-4-mini's shapes (benchmarks/scale/README.md).
"""

from __future__ import annotations

__all__ = ["CHECKED_WEIGHTS", "judged_rows"]

CHECKED_WEIGHTS = 1 << 24  # at a time, and as many errors of each candidate
_JUDGED_ROWS = 1024


def judged_rows(rows: int) -> range:
    """Which of so many rows of a weight are computed: every k-th, at least 1,024 and fewer than twice as many, or all.

    They are those of ``weight[::judged_rows(len(weight)).step]``.
    """
    return range(0, rows, max(1, rows // _JUDGED_ROWS))
