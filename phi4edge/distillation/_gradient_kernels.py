"""Gradients of weights reduced to those of their groups, compiled for the CPU: one pass over them, and no copies."""

from __future__ import annotations

__all__ = ["reduce_groups"]

import numpy as np
import numpy.typing as npt

from phi4edge.core.compiled import compiled

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_LANES = 16  # values of a group that are summed side by side: one order of sums, however wide vectors are


def reduce_groups(gradient: Array, codes: Bytes, along: Array, total: Array) -> None:
    """Put Σ g·q of every group into ``along`` and Σ g into ``total``, both [rows, groups].

    ``gradient`` g and ``codes`` q are [rows, in_features].
    """
    _reduce(gradient, codes, along, total)


@compiled
def _reduce(gradient, codes, along, total):
    rows, groups = along.shape
    size = gradient.shape[1] // groups
    whole = size // _LANES * _LANES
    weighed, plain = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for row in range(rows):
        for group in range(groups):
            first = group * size
            for k in range(_LANES):
                weighed[k] = np.float32(0)
                plain[k] = np.float32(0)
            for i in range(first, first + whole, _LANES):
                for k in range(_LANES):
                    g = gradient[row, i + k]
                    weighed[k] += g * np.float32(codes[row, i + k])
                    plain[k] += g
            for i in range(first + whole, first + size):
                weighed[0] += gradient[row, i] * np.float32(codes[row, i])
                plain[0] += gradient[row, i]
            a, b = np.float32(0), np.float32(0)
            for k in range(_LANES):
                a += weighed[k]
                b += plain[k]
            along[row, group] = a
            total[row, group] = b
