"""Products with float32 sums on a CPU's bfloat16 units: a tile at a time, each on one core.

What torch itself uses in attention and in compiled code, ``at::native::cpublas::brgemm``: both factors bfloat16, sums
float32, which torch's operators offer a part only of. It is no operator, so it is called by its symbol in
libtorch_cpu, after it has been held against float64. There are no tiles on AMX, whose units torch's own switch uses and
where they were not tried, nor in a build of torch that has no such symbol.

The bytes of a sum hang on shapes, kind of CPU and build of torch, not on how many cores there are.
"""

from __future__ import annotations

__all__ = ["TILE", "Tiles", "in_pairs", "needed_tiles", "tiles"]

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from phi4edge.core.errors import MissingToolError
from phi4edge.model._bfloat16_kernels import put_in_pairs
from phi4edge.model.compute import has_amx, has_bfloat16_units

TILE = 256  # rows and columns of a sum that one call adds to: what they are made of stays in a core's cache
_DEPTH = 1024  # of both factors, in a call
_ERROR = 1e-5  # relative, beside float32 products of the same rounded inputs: only the order of additions differs
_LIBRARY = "libtorch_cpu.so"
# of at::native::cpublas: void brgemm(M, N, K, lda, ldb, ldc, add_C, A, B, C, is_vnni), void brgemm_release(is_vnni)
_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # where oneDNN is told to use less than there is


@dataclass(frozen=True)
class Tiles:
    """The units; see :func:`tiles`."""

    _add: Callable[..., None]  # see _BRGEMM
    _release: Callable[[bool], None]  # of what this thread's unit was set to

    def add(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """Add L R to ``sums`` [rows, columns] float32, on this core.

        ``left`` is L [rows, depth] bfloat16, ``right`` is R as :func:`in_pairs` has it, [depth / 2, columns, 2]. Rows
        and columns may be parts of wider arrays.
        """
        (rows, columns), depth = sums.shape, left.shape[1]
        # What is called takes pointers, and would go beyond an array's end.
        assert left.shape == (rows, 2 * right.shape[0]), "rows of the left factor, and its depth"
        assert right.shape[1:] == (columns, 2), "columns of the right factor"
        assert (sums.dtype, left.dtype, right.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        assert (sums.stride(1), left.stride(1), right.stride()[1:]) == (1, 1, (2, 1)), "rows in one piece"
        a, b, c = left.data_ptr(), right.data_ptr(), sums.data_ptr()
        a_pitch, b_pitch, c_pitch = left.stride(0), right.stride(0) // 2, sums.stride(0)
        for row in range(0, rows, TILE):
            height = min(TILE, rows - row)
            for column in range(0, columns, TILE):
                width = min(TILE, columns - column)
                for start in range(0, depth, _DEPTH):
                    A, B = a + 2 * (row * a_pitch + start), b + 2 * (start * b_pitch + 2 * column)
                    C, count = c + 4 * (row * c_pitch + column), min(_DEPTH, depth - start)
                    self._add(height, width, count, a_pitch, b_pitch, c_pitch, True, A, B, C, True)
        self._release(True)


def in_pairs(rows: Tensor) -> Tensor:
    """``rows`` [depth, columns] as a right factor, [⌈depth / 2⌉, columns, 2] bfloat16.

    Behind an odd number of float32 rows stand zeros; of bfloat16 ones there is an even number.
    """
    if rows.dtype == torch.bfloat16:
        return torch.stack((rows[0::2], rows[1::2]), -1)
    depth, columns = rows.shape
    pairs = torch.empty(-(-depth // 2), columns, 2, dtype=torch.bfloat16)
    put_in_pairs(rows.detach().contiguous().numpy(), pairs.view(torch.int32)[:, :, 0].numpy().view(np.uint32))
    return pairs


def needed_tiles() -> Tiles:
    """The units, for what was begun with them.

    Raises:
        MissingToolError: there are none here.
    """
    found = tiles()
    if found is None:
        raise MissingToolError("no tiles on bfloat16 units here, where another machine of this run has them")
    return found


@cache
def tiles() -> Tiles | None:
    """The units, or None where there are none that are used this way."""
    if not has_bfloat16_units() or has_amx() or any(os.environ.get(name) for name in _LIMITS):
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY))
        add, release = getattr(library, _BRGEMM), getattr(library, _RELEASE)
    except (OSError, AttributeError):
        return None
    add.argtypes = [*[ctypes.c_int64] * 6, ctypes.c_bool, *[ctypes.c_void_p] * 3, ctypes.c_bool]
    add.restype = None
    release.argtypes, release.restype = [ctypes.c_bool], None
    found = Tiles(add, release)
    return found if _adds_products(found) else None


def _adds_products(units: Tiles) -> bool:
    """Whether they add what they should, with a depth, rows and columns that fill no vector."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(37, 90, generator=generator), torch.randn(90, 51, generator=generator)
    sums = torch.ones(37, 51)
    units.add(sums, A.bfloat16(), in_pairs(B))
    exact = A.bfloat16().double() @ B.bfloat16().double() + 1
    return bool((sums - exact).norm() < _ERROR * exact.norm())
