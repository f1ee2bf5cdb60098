"""How matrix products of the forward passes and of the Hessians are computed: float32, or the CPU's bfloat16 units.

Where a CPU has such units (AMX, AVX-512 BF16) a product is several times as fast on them. Its inputs are rounded to
bfloat16 on the way in, sums stay float32; activations of a bfloat16 model hold no more anyway. Solvers factor and round
in float32; what they may leave to the units are sums of errors over many columns, where there are tiles.

The switch is torch's (``torch.backends.mkldnn.matmul.fp32_precision``). oneDNN follows it on AMX, and rounds both
inputs for every product, which for a large weight and few tokens takes longer than the product itself; on a CPU with no
more than AVX-512 BF16 it goes on in float32, if not always by the same kernel, so that last bits may be others. What
counts is handed over in bfloat16: :func:`prepared` rounds a weight once for all of its products, whose outputs are then
bfloat16 as well, as they are in the model, and sums over tokens and products with the head, which stay float32, are
:mod:`phi4edge.model.crossed`'s and :mod:`phi4edge.model.summed`'s, on :mod:`phi4edge.model.tiles`. Which units are used
decides bits of the codes, so it is part of what a run was begun with.
"""

from __future__ import annotations

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "Speeds",
    "choose_compute",
    "computing",
    "decoded",
    "has_amx",
    "has_bfloat16_units",
    "measure_compute",
    "prepared",
    "product",
    "rounding",
]

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.core.errors import MissingToolError
from phi4edge.core.recipe import BFLOAT16, FLOAT32
from phi4edge.model._bfloat16_kernels import put_values
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import row_pieces, run_parallel

_TOKENS, _WIDTH = 1024, 2048  # of the products that are timed
_SECONDS, _TURNS = 0.2, 4  # for each of both
_WORTH = 1.2  # times as fast, for bits that differ
_ERROR = 2.0**-7  # of the norm: twice what rounding both inputs and the output may cost


@dataclass(frozen=True)
class Speeds:
    """What products ran at here."""

    float32: float  # GFLOP/s
    bfloat16: float  # GFLOP/s
    error: float  # norm of the difference, relative to the float32 product's


def has_bfloat16_units() -> bool:
    """Whether this CPU computes bfloat16 products and torch can ask it to."""
    return has_amx() or _says("_is_avx512_bf16_supported")


def has_amx() -> bool:
    """Whether these units are AMX."""
    return _says("_is_amx_tile_supported")


def _says(name: str) -> bool:
    probe = getattr(torch.cpu, name, None)
    return probe is not None and bool(probe())


@contextmanager
def computing(unit: str) -> Iterator[None]:
    """Products inside are computed as ``unit`` says; the setting is the process's."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if unit == BFLOAT16 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def rounding() -> bool:
    """Whether :func:`computing` was asked for bfloat16 units here."""
    return bool(torch.backends.mkldnn.matmul.fp32_precision == "bf16")  # type: ignore[attr-defined]


def prepared(weight: Tensor) -> Tensor:
    """``weight`` [out_features, in_features] float32 as :func:`product` takes it, inside :func:`computing`."""
    return weight.bfloat16() if rounding() and weight.device.type == "cpu" else weight


def decoded(linear: QuantizedLinear) -> Tensor:
    """The prepared weight of a quantized linear, without its float32 values in RAM where it is rounded."""
    codes = linear.codes
    if not rounding() or codes.device.type != "cpu":
        return prepared(linear.dequantize())
    a, b = (step.contiguous().numpy() for step in grid_for(linear.scheme).steps(linear.params))
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    q, bits = codes.contiguous().numpy(), out.view(torch.int16).numpy().view(np.uint16)
    run_parallel([partial(put_values, q[r], a[r], b[r], bits[r]) for r in row_pieces(*codes.shape)])
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """X Wᵀ [..., out_features] in the type of the inputs ``x`` [..., in_features], with a prepared weight."""
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def measure_compute() -> Speeds:
    """Time and compare both kinds of product on this machine, a fraction of a second.

    They take turns, and each counts as what it did in its best one: something else on the machine for a moment is no
    reason to compute a whole run another way.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, _WIDTH, generator=generator) for rows in (_TOKENS, _WIDTH))
    best, out = {FLOAT32: 0.0, BFLOAT16: 0.0}, {}
    for _ in range(_TURNS):
        for unit in best:
            speed, out[unit] = _timed(unit, x, w)
            best[unit] = max(best[unit], speed)
    error = (out[BFLOAT16] - out[FLOAT32]).norm() / out[FLOAT32].norm()
    return Speeds(best[FLOAT32], best[BFLOAT16], float(error))


def _timed(unit: str, x: Tensor, w: Tensor) -> tuple[float, Tensor]:
    """GFLOP/s of a turn, and the product."""
    with computing(unit), torch.inference_mode():
        w = prepared(w)
        out, done = product(x, w), 0
        started = time.perf_counter()
        while time.perf_counter() - started < _SECONDS / _TURNS:
            out, done = product(x, w), done + 1
        return 2e-9 * done * x.shape[0] * w.numel() / (time.perf_counter() - started), out


def choose_compute(asked: str, device: str = "cpu") -> str:
    """``asked`` with "auto" decided: bfloat16 where it is worth it and as exact as it can be, else float32.

    Raises:
        MissingToolError: bfloat16 was asked for and cannot be had.
    """
    there = device == "cpu" and has_bfloat16_units()
    if asked == BFLOAT16 and not there:
        raise MissingToolError(
            "no bfloat16 units that torch can use: they are looked for on CPUs with AMX or AVX-512 BF16",
            "use --compute float32",
        )
    if asked != "auto" or not there:
        return asked if asked != "auto" else FLOAT32
    speeds = measure_compute()
    return BFLOAT16 if speeds.bfloat16 > _WORTH * speeds.float32 and speeds.error < _ERROR else FLOAT32
