"""Products over tokens, AᵀB added to float32 sums: what Hessians are made of.

In float32 that is torch's ``addmm_``. On bfloat16 units both inputs should be rounded once, multiplied there and added
in float32. Given float32 inputs oneDNN does that on AMX, but on a CPU with no more than AVX-512 BF16 it computes in
float32, at less than half the speed; given bfloat16 inputs the sums are rounded too. There :mod:`phi4edge.model.tiles`
takes ``addmm_``'s place.
"""

from __future__ import annotations

__all__ = ["Packed", "Part", "add_products", "over_tokens", "packed_bytes", "upper_rows"]

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.model.compute import rounding
from phi4edge.model.tiles import TILE, Tiles, in_pairs, tiles
from phi4edge.quant.parallel import run_parallel

_UPPER_PARTS = 8  # 9/16 of a whole product is computed


@dataclass(frozen=True)
class Packed:
    """Rows [tokens, width] rounded to bfloat16, one of zeros after them where they are odd, as a factor."""

    pairs: Tensor  # [tokens / 2, width, 2]

    def columns(self, which: slice) -> Tensor:
        """Some columns as rows of the left factor [count, tokens]: turned a pair at a time, in a core's cache."""
        piece = self.pairs.view(torch.int32)[:, which, 0].contiguous()  # rows of a wide matrix share places in a cache
        return piece.T.reshape(-1).view(torch.bfloat16).view(piece.shape[1], -1)


@dataclass(frozen=True)
class Part:
    """Of a sum AᵀB: ``values`` [count, width] float32 from ``row`` and ``column`` on, each row in one piece."""

    values: Tensor
    row: int = 0
    column: int = 0


def over_tokens(rows: Tensor) -> Tensor | Packed:
    """``rows`` [tokens, width] float32 as a factor of :func:`add_products`, inside :func:`computing`."""
    if not rounding() or rows.device.type != "cpu" or rows.shape[0] == 0 or tiles() is None:
        return rows
    return Packed(in_pairs(rows))


def packed_bytes(tokens: int, width: int) -> int:
    """What a packed factor takes."""
    return 2 * (tokens + tokens % 2) * width


def upper_rows(width: int) -> list[slice]:
    """Rows of a symmetric sum [width, width] in about eight parts, for :func:`add_products` from the diagonal on."""
    count = -(-width // (_UPPER_PARTS * TILE)) * TILE
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
    units = tiles()
    assert units is not None
    strips = []
    for part in parts:
        count = part.values.shape[0]
        for start in range(0, count, TILE):
            rows = slice(start, min(start + TILE, count))
            first = max(0, part.row + start - part.column) if symmetric else 0
            strips.append(partial(_add_strip, units, part, rows, first, left, right.pairs))
    run_parallel(strips)


def _add_strip(units: Tiles, part: Part, rows: slice, first: int, left: Packed, right: Tensor) -> None:
    """Some rows of a part, its columns from ``first`` on."""
    there = left.columns(slice(part.row + rows.start, part.row + rows.stop))
    beside = right[:, part.column + first : part.column + part.values.shape[1]]
    units.add(part.values[rows, first:], there, beside)
