"""Errors of columns that are rounded, and what they hand on to the ones that follow.

    E [n, rows]  errors of the columns in the order of the walk, W − Q
    M [n, n]     unit upper triangular (:mod:`phi4edge.solvers._factor`)

Columns go by in blocks, and some blocks make a far one. Before a far block begins, all that is finished is handed on to
its columns in one product, which is most of the walk's work. In float32 that is a product of M and E as they are. On
tiles of bfloat16 units (:mod:`phi4edge.model.tiles`) both factors are rounded for it: E as columns are finished, Mᵀ by
the factorisation, into that half of its own matrix which nobody reads. Inside a far block everything is float32.

Some per cent of the codes come out otherwise for it, and the loss is what it is in float32 to some hundredths of a per
cent (``benchmarks/kernels/on_tiles.py``).
"""

from __future__ import annotations

__all__ = ["Finished", "Span", "put_transpose", "span", "transpose_of"]

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.model.tiles import in_pairs, needed_tiles
from phi4edge.quant.parallel import run_parallel

_BLOCK = 128  # columns between two products with those finished since
_FAR = 4  # blocks between two products with all finished columns: the wider, the nearer to what a core can do
_FAR_TILES = 2  # the same on tiles, where a product of that width is as fast and what is not one of them counts more


@dataclass(frozen=True)
class Span:
    """Columns of a block and of a far block."""

    block: int
    far: int


def span(unit: int, n: int, *, on_tiles: bool) -> Span:
    """Where parameters are found ``unit`` columns at a time, or ahead of the walk (``unit`` n)."""
    block = _BLOCK if unit == n else unit * math.ceil(_BLOCK / unit)
    return Span(block, block * (_FAR_TILES if on_tiles else _FAR))


def put_transpose(M: Tensor, far: int) -> None:
    """Mᵀ rounded to bfloat16 into what lies below the diagonal of ``M``, as far as far blocks of that width ask for it.

    Row i of it has the place of the first half of row i: what is needed are its columns before the far block of i.
    """

    def put(start: int) -> None:
        here = slice(start, min(start + far, M.shape[0]))
        M.view(torch.bfloat16)[here, :start] = M[:start, here].T

    run_parallel([partial(put, start) for start in range(far, M.shape[0], far)])


def transpose_of(M: Tensor) -> Tensor:
    """Mᵀ [n, n] as :func:`put_transpose` left it: columns of a row's far block and behind it are something else."""
    return M.view(torch.bfloat16)[:, : M.shape[0]]


class Finished:
    """Errors of some rows of a weight on their way over its columns."""

    def __init__(self, M: Tensor, rows: int, far: int, *, on_tiles: bool) -> None:
        """``on_tiles``: :func:`put_transpose` was called on ``M``."""
        n = M.shape[0]
        self._M, self._begun = M, 0  # the column that the far block in work begins with
        self._units = needed_tiles() if on_tiles else None
        # [columns, rows] float32: all of them, or on tiles those of the far block in work.
        self._errors = torch.empty(n if self._units is None else min(far, n), rows, device=M.device)
        self._pairs = torch.empty(0 if self._units is None else n // 2, rows, 2, dtype=torch.bfloat16)

    def errors(self, first: int, last: int) -> Tensor:
        """Those of columns of the far block in work, [columns, rows] float32, to be read and written."""
        before = 0 if self._units is None else self._begun
        return self._errors[first - before : last - before]

    def begin(self, start: int, original: Tensor) -> Tensor:
        """The far block from column ``start`` on, ``original`` [columns, rows], with all that is handed on to it."""
        ahead = slice(start, start + original.shape[0])
        if self._units is None:
            return torch.addmm(original, self._M[:start, ahead].T, self._errors[:start])
        self._pairs[self._begun // 2 : start // 2] = in_pairs(self._errors[: start - self._begun])
        self._begun = start
        sums = original.clone()
        if start:
            self._units.add(sums, transpose_of(self._M)[ahead, :start], self._pairs[: start // 2])
        return sums
