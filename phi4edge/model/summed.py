"""Products with float32 sums of a matrix that is read for one product and forgotten: slices of the head.

In float32 and on AMX they are torch's, which follows the switch of :mod:`phi4edge.model.compute`. On a CPU with
no more than AVX-512 BF16 that would compute in float32, or round the sums as well; there both inputs are rounded to
bfloat16 and multiplied on :mod:`phi4edge.model.tiles`.
"""

from __future__ import annotations

__all__ = ["add_times", "times_transposed"]

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.model.compute import rounding
from phi4edge.model.tiles import TILE, Tiles, in_pairs, tiles
from phi4edge.quant.parallel import run_parallel


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """X Wᵀ [tokens, rows] float32, of ``x`` [tokens, width] float32 and ``weight`` [rows, width] of any type."""
    units = _units(x, weight.shape[1])
    if units is None:
        return F.linear(x, weight.float())
    # Two neighbours in a row are one of 32 bits, so the transpose has them in pairs.
    pairs = weight.bfloat16().view(torch.int32).T.contiguous().view(torch.bfloat16)
    sums = torch.zeros(x.shape[0], weight.shape[0])
    _add(units, sums, x, pairs.view(weight.shape[1] // 2, weight.shape[0], 2))
    return sums


def add_times(sums: Tensor, p: Tensor, weight: Tensor) -> None:
    """Add P W to ``sums`` [tokens, width] float32, of ``p`` [tokens, rows] float32 and ``weight`` [rows, width]."""
    units = _units(p, weight.shape[0])
    if units is None:
        sums.addmm_(p, weight.float())
    else:
        _add(units, sums, p, in_pairs(weight))


def _units(left: Tensor, depth: int) -> Tiles | None:
    """The units, where this product is theirs: a depth of pairs, as a vocabulary's last slice may not have."""
    there = rounding() and left.device.type == "cpu" and depth % 2 == 0
    return tiles() if there else None


def _add(units: Tiles, sums: Tensor, left: Tensor, right: Tensor) -> None:
    rounded = left.bfloat16()
    starts = range(0, len(sums), TILE)
    run_parallel([partial(units.add, sums[i : i + TILE], rounded[i : i + TILE], right) for i in starts])
