"""Rounding to GGML blocks without data: for embedding and head, which no Hessian describes.

``quantize_q8_0`` is libggml's own rounding, bit for bit. ``quantize_q6_k`` minimises the plain squared error, which
libggml's reference does not (it weights each term by x²):

    Σ (x − d·scale·q)²      over q ∈ −32…31, scale ∈ −128…127 for each 16 weights, d ∈ float16 for each 256

by a search for the step of each sub-block of 16 on its own, and several candidates for d. The error is 10 to 15 %
below libggml's; alternating codes, scales and d afterwards gains less than half a percent more, so it is not done.
"""

from __future__ import annotations

__all__ = ["quantize_q6_k", "quantize_q8_0", "store_float"]

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant._q8_kernels import round_q8_0
from phi4edge.quant.ggml_blocks import BLOCK_TYPES, pack_blocks
from phi4edge.quant.parallel import run_parallel

_CHUNK = 1 << 17  # weights rounded at a time: what they need stays in a core's cache
_SPANS = tuple(0.8 + 0.016 * i for i in range(25))  # codes' span over the absmax span; above 1 the extreme is clipped
_TOPS = (-128.0, 127.0, -124.0, 120.0)  # which integer scale the widest sub-block gets


def store_float(values: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """``values`` [rows, n] float32 in ``dtype``, as bytes: uint8 [rows, bytes].

    Raises:
        InputError: a value exceeds float16; the first one is named.
    """
    stored = values.to(dtype)
    low, high = values.aminmax()  # one pass; what could overflow is looked at again
    if not max(-float(low), float(high)) <= torch.finfo(dtype).max and not bool(torch.isfinite(stored).all()):
        at = (~torch.isfinite(stored)).nonzero()[0].tolist()
        raise InputError(
            f"{where}: {values[tuple(at)].item():.4g} at {at} exceeds float16's 65504",
            "store it as q8_0 (--head, --embedding), or the whole model as bf16 or f32",
        )
    return stored.contiguous().reshape(-1).view(torch.uint8).reshape(values.shape[0], -1)


def _in_pieces(values: Tensor, where: str, rounding: Callable[[Tensor, str], Tensor]) -> Tensor:
    """``rounding`` of some rows at a time, on as many cores as torch was given."""
    step = max(1, _CHUNK // values.shape[1])

    def piece(start: int) -> Callable[[], Tensor]:
        return lambda: rounding(values[start : start + step], where)

    return torch.cat(run_parallel([piece(start) for start in range(0, values.shape[0], step)]))


def quantize_q8_0(values: Tensor, where: str = "weight") -> Tensor:
    """Q8_0 blocks of ``values`` [rows, in_features] float32, in_features a multiple of 32: uint8 [rows, bytes].

    As libggml's quantize_row_q8_0_ref: d = absmax / 127 and q = x / d, halves away from zero, with the
    d that is not yet rounded to float16.

    Raises:
        InputError: a block's d exceeds float16.
    """
    return _in_pieces(values, where, _q8_0)


def _q8_0(values: Tensor, where: str) -> Tensor:
    rows = values.shape[0]
    x = values.reshape(-1, 32).numpy()
    out = np.empty((len(x), 34), np.uint8)
    d = torch.from_numpy(round_q8_0(x, out)).reshape(rows, -1)
    out[:, :2] = store_float(d, torch.float16, f"{where}: scale").reshape(-1, 2).numpy()
    return torch.from_numpy(out).reshape(rows, -1)


def quantize_q6_k(values: Tensor, where: str = "weight") -> Tensor:
    """Q6_K blocks of ``values`` [rows, in_features] float32, in_features a multiple of 256: uint8 [rows, bytes].

    Raises:
        InputError: a super-block's d exceeds float16.
    """
    return _in_pieces(values, where, _q6_k)


def _q6_k(values: Tensor, where: str) -> Tensor:
    rows = values.shape[0]
    x = values.reshape(-1, 16, 16)  # [super-blocks, sub-blocks, 16]
    wanted = _sub_block_steps(x)  # [super-blocks, 16]
    extreme = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))
    best = torch.full((x.shape[0], 1, 1), torch.inf)
    codes, scales, d = torch.zeros_like(x), torch.zeros_like(wanted), torch.zeros_like(extreme)
    for top in _TOPS:
        trial_d = (extreme / top).to(torch.float16).float()
        trial_scales = _divide(wanted, trial_d).round_().clamp_(-128, 127)
        step = (trial_d * trial_scales)[:, :, None]
        trial_codes = _divide(x, step.expand_as(x)).round_().clamp_(-32, 31)
        error = (step * trial_codes - x).square_().sum((1, 2), keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better, trial_codes, codes)
        scales = torch.where(better[:, :, 0], trial_scales, scales)
        d = torch.where(better[:, :, 0], trial_d, d)
    if not bool(torch.isfinite(best).all()):
        largest = float(x.abs().max())
        raise InputError(f"{where}: values up to {largest:.4g} need a Q6_K scale beyond float16's 65504")
    codes = (codes + 32).to(torch.uint8).reshape(rows, -1)
    params = {"scales": d.reshape(rows, -1).to(torch.float16), "sub_scales": scales.to(torch.int8).reshape(rows, -1)}
    return pack_blocks(BLOCK_TYPES["q6_k"], codes, params)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    zero = denominator == 0
    return torch.where(zero, torch.zeros_like(numerator), numerator / torch.where(zero, 1.0, denominator))


def _sub_block_steps(x: Tensor) -> Tensor:
    """The step of each sub-block that loses least on its own, of either sign: [super-blocks, 16]."""
    extreme = x.gather(2, x.abs().argmax(2, keepdim=True))
    best, step = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)
    for span in _SPANS:
        for end in (-32.0, 31.0):
            q = (x * _divide(torch.full_like(extreme, end * span), extreme)).round_().clamp_(-32, 31)
            along, square = (x * q).sum(2, keepdim=True), (q * q).sum(2, keepdim=True)
            score = _divide(along * along, square)  # what the error falls by at the best step
            better = score > best
            best = torch.where(better, score, best)
            step = torch.where(better, _divide(along, square), step)
    return step.squeeze(2)
