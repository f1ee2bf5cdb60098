"""Values rounded to the nearest codes of a grid whose parameters are given, and what that loses."""

from __future__ import annotations

__all__ = ["round_to"]

import torch
from torch import Tensor

from phi4edge.quant._rounding_kernels import round_groups
from phi4edge.quant.grid import Grid, Params
from phi4edge.quant.packing import pack_nibbles


def round_to(grid: Grid, values: Tensor, params: Params, importance: Tensor | None = None) -> tuple[Tensor, float]:
    """Codes of ``values`` [rows, groups, group_size] float32 as a run stores them, and Σ importance·E² of the errors E.

    ``importance`` [groups, group_size], or None where all count alike. Codes are [rows, in_features] uint8, with four
    bits two to a byte. On the CPU this is one pass, and elsewhere the same with tensors.
    """
    a, b = grid.steps(params)
    rows, packed = len(values), grid.scheme.bits == 4
    if values.device.type == "cpu":
        x, h = (
            values.reshape(-1, values.shape[-1]).numpy(),
            None if importance is None else importance.contiguous().numpy(),
        )
        steps = (a.reshape(-1).numpy(), b.reshape(-1).numpy())
        found, lost = round_groups(x, *steps, h, (grid.low, grid.high, grid.idle), packed=packed)
        return torch.from_numpy(found).reshape(rows, -1), lost
    a, b = a[:, :, None], b[:, :, None]
    q = grid.encode(values, a, b)
    codes = q.to(torch.uint8).reshape(rows, -1)
    E = values - q.mul_(a).add_(b)
    lost = float(((E if importance is None else E * importance) * E).sum(dtype=torch.float64))
    return pack_nibbles(codes) if packed else codes, lost
