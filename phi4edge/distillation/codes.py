"""Learned rounding: codes that move where the gradient of KLD asks for it long enough.

Behind every code q stands a latent position c on the code axis, at first where the unrounded weight lies within half a
step of q; q = round(c), and the backward pass goes straight through the rounding. A step moves c against the momentum
of its gradient, in units of the gradient's own size in that row,

    n = g / rms_row(g),  g = ∂KLD/∂c = a · ∂KLD/∂W        m ← β m + (1 − β) n        c ← c − rate · m

so that what is noise goes back and forth, and what is asked for by batch after batch arrives. Offsets c − q₀ and the
momentum are float16: two bytes each a weight.
"""

from __future__ import annotations

__all__ = ["code_step", "codes_of", "latent_state"]

from functools import partial

import torch
from torch import Tensor

from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import SMALL_PIECE, row_pieces, run_parallel

_BETA = 0.9
_ROWS = 256  # rows that are worked on at a time
_EDGE = 0.49  # how near to the next code a latent position begins at most


def latent_state(linear: QuantizedLinear, weight: Tensor) -> Tensor:
    """Offsets from the solver's codes and their momentum, [2, out, in] float16, for the unrounded ``weight``."""
    a, b = grid_for(linear.scheme).steps(linear.params)
    rows, groups = a.shape
    safe = torch.where(a == 0, torch.ones_like(a), a)[:, :, None]
    position = (weight.reshape(rows, groups, -1) - b[:, :, None]) / safe
    offset = (position.reshape(rows, -1) - linear.codes).clamp_(-_EDGE, _EDGE)
    return torch.stack((offset, torch.zeros_like(offset))).to(torch.float16)


def codes_of(linear: QuantizedLinear, offset: Tensor) -> Tensor:
    """The codes [out, in] uint8 that latent positions round to; ``offset`` is c − q₀ from the codes of ``linear``."""
    grid, (rows, columns) = grid_for(linear.scheme), offset.shape

    def piece(rows: slice) -> Tensor:
        moved = linear.codes[rows] + offset[rows].float().round_()
        return moved.clamp_(grid.low, grid.high).to(torch.uint8)

    pieces = row_pieces(rows, columns, max(1, SMALL_PIECE // columns))
    return torch.cat(run_parallel([partial(piece, rows) for rows in pieces]))


def code_step(linear: QuantizedLinear, state: Tensor, dW: Tensor, rate: float) -> Tensor:
    """The latent state after a step; ``dW`` [out, in] is the gradient of the weight, ``linear`` as it is now."""
    a, _ = grid_for(linear.scheme).steps(linear.params)
    groups = a.shape[1]

    def piece(start: int) -> Tensor:
        rows = slice(start, start + _ROWS)
        part = dW[rows].reshape(-1, groups, dW.shape[1] // groups) * a[rows, :, None]
        g = part.reshape(-1, dW.shape[1])
        n = g / g.square().mean(1, keepdim=True).sqrt_().clamp_min_(1e-30)
        m = torch.lerp(n, state[1, rows].float(), _BETA)
        return torch.stack((state[0, rows].float() - rate * m, m)).to(torch.float16)

    starts = range(0, linear.out_features, _ROWS)
    return torch.cat(run_parallel([partial(piece, start) for start in starts]), dim=1)
