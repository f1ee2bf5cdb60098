"""Products over tokens, AᵀB added to float32 sums: what Hessians are made of.

In float32 that is torch's ``addmm_``. On bfloat16 units both inputs should be rounded once, multiplied there and added
in float32, of which torch's operators offer a part only. Given float32 inputs oneDNN uses AMX, but on a CPU with no
more than AVX-512 BF16 it computes in float32, at less than half the speed; given bfloat16 inputs the sums are rounded
too. What torch itself uses in attention and in compiled code does all of it, ``at::native::cpublas::brgemm``: one
tile, on one core. It is no operator, so it is called by its symbol in libtorch_cpu.

``addmm_`` stays where there is AMX, whose units it uses and where tiles were not tried, and in a build of torch that
has no such symbol or whose tiles are not the products they should be.

The bytes of a sum hang on shapes, kind of CPU and build of torch, not on how many cores there are.
"""

from __future__ import annotations

__all__ = ["Packed", "Part", "add_products", "has_tiles", "over_tokens", "packed_bytes", "upper_rows"]

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from phi4edge.model.compute import has_amx, has_bfloat16_units, rounding
from phi4edge.quant.parallel import run_parallel

_TILE = 256  # rows and columns of a sum that one call adds to: what they are made of stays in a core's cache
_TOKENS = 1024  # of a call
_UPPER_PARTS = 8  # 9/16 of a whole product is computed
_ERROR = 1e-5  # relative, beside float32 products of the same rounded inputs: only the order of additions differs
_LIBRARY = "libtorch_cpu.so"
# of at::native::cpublas: void brgemm(M, N, K, lda, ldb, ldc, add_C, A, B, C, is_vnni), void brgemm_release(is_vnni)
_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # where oneDNN is told to use less than there is


@dataclass(frozen=True)
class Packed:
    """Rows [tokens, width] rounded to bfloat16, one of zeros after them where they are odd, as a factor."""

    left: Tensor | None  # [width, tokens]
    right: Tensor  # [tokens / 2, width, 2]


@dataclass(frozen=True)
class Part:
    """Of a sum AᵀB: ``values`` [count, width] float32 from ``row`` and ``column`` on, each row in one piece."""

    values: Tensor
    row: int = 0
    column: int = 0


def has_tiles() -> bool:
    """Whether tiles on bfloat16 units, with float32 sums, take ``addmm_``'s place here."""
    return _tiles() is not None


def over_tokens(rows: Tensor, *, left: bool = True) -> Tensor | Packed:
    """``rows`` [tokens, width] float32 as a factor of :func:`add_products`, inside :func:`computing`.

    ``left``: they may be the left one.
    """
    if not rounding() or rows.device.type != "cpu" or rows.shape[0] == 0 or not has_tiles():
        return rows
    return _packed(rows, left=left)


def _packed(rows: Tensor, *, left: bool) -> Packed:
    tokens, width = rows.shape
    rounded = torch.empty(tokens + tokens % 2, width, dtype=torch.bfloat16)
    rounded[:tokens] = rows
    rounded[tokens:] = 0
    pairs = torch.stack((rounded[0::2], rounded[1::2]), -1)
    del rounded
    if not left:
        return Packed(None, pairs)
    columns = pairs.view(torch.int32).squeeze(-1).T.reshape(-1)  # a pair at a time: half as many moves
    return Packed(columns.view(torch.bfloat16).view(width, -1), pairs)


def packed_bytes(tokens: int, width: int) -> int:
    """What a packed factor takes, and while it is made."""
    return 2 * 2 * (tokens + tokens % 2) * width


def upper_rows(width: int) -> list[slice]:
    """Rows of a symmetric sum [width, width] in about eight parts, for :func:`add_products` from the diagonal on."""
    count = -(-width // (_UPPER_PARTS * _TILE)) * _TILE
    return [slice(start, min(start + count, width)) for start in range(0, width, count)]


def add_products(
    parts: Sequence[Part], left: Tensor | Packed, right: Tensor | Packed, *, symmetric: bool = False
) -> None:
    """Add AᵀB, summed over tokens, to ``parts`` of a sum; ``left`` is of A, ``right`` of B.

    ``symmetric``: A is B, and what lies below the diagonal may be left out.
    """
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        assert isinstance(left, Tensor), "factors of one kind"
        assert isinstance(right, Tensor), "factors of one kind"
        for part in parts:
            (count, width), row, column = part.values.shape, part.row, part.column
            part.values.addmm_(left[:, row : row + count].T, right[:, column : column + width])
        return
    tiles = _tiles()
    assert tiles is not None
    assert left.left is not None
    assert left.left.shape[1] == 2 * right.right.shape[0], "factors of the same tokens"
    strips = []
    for part in parts:
        (count, width), row, column = part.values.shape, part.row, part.column
        # What is called takes pointers, and would go beyond an array's end.
        assert row + count <= left.left.shape[0], "rows of the left factor"
        assert column + width <= right.right.shape[1], "columns of the right factor"
        assert part.values.dtype == torch.float32
        assert part.values.stride(1) == 1
        for start in range(0, count, _TILE):
            first = max(0, row + start - column) if symmetric else 0
            strips.append(partial(_add_strip, tiles, part, start, first, left.left, right.right))
    run_parallel(strips)


@dataclass(frozen=True)
class _Tiles:
    add: Callable[..., None]  # see _BRGEMM
    release: Callable[[bool], None]  # of what this thread's unit was set to


def _add_strip(tiles: _Tiles, part: Part, start: int, first: int, left: Tensor, right: Tensor) -> None:
    """Rows of a part from ``start`` on, as many as a tile has, its columns from ``first`` on."""
    values = part.values
    tokens, width, pitch = left.shape[1], right.shape[1], values.stride(0)
    rows = min(_TILE, values.shape[0] - start)
    for column in range(first, values.shape[1], _TILE):
        columns = min(_TILE, values.shape[1] - column)
        sums = values.data_ptr() + values.itemsize * (start * pitch + column)
        for token in range(0, tokens, _TOKENS):
            a = left.data_ptr() + left.itemsize * ((part.row + start) * tokens + token)
            b = right.data_ptr() + right.itemsize * (token * width + 2 * (part.column + column))
            count = min(_TOKENS, tokens - token)
            tiles.add(rows, columns, count, tokens, width, pitch, True, a, b, sums, True)
    tiles.release(True)


@cache
def _tiles() -> _Tiles | None:
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
    tiles = _Tiles(add, release)
    return tiles if _adds_products(tiles) else None


def _adds_products(tiles: _Tiles) -> bool:
    """Whether tiles add what they should, with tokens, rows and columns that fill no vector."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(90, width, generator=generator) for width in (37, 51))
    left, right = _packed(A, left=True), _packed(B, left=False)
    assert left.left is not None
    part = Part(torch.ones(37, 51))
    _add_strip(tiles, part, 0, 0, left.left, right.right)
    exact = A.bfloat16().double().T @ B.bfloat16().double() + 1
    return bool((part.values - exact).norm() < _ERROR * exact.norm())
