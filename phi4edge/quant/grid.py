"""The one definition of every grid: which real numbers a group of codes can stand for.

On every grid here a code ``q`` stands for ``a·q + b``, with ``a`` and ``b`` fixed for a row and a
group, so one solver loop serves all of them. What differs is what is stored for ``a`` and ``b``:

===========  ==================================  ===========================  ===========
grid         stored                              a, b                         codes
===========  ==================================  ===========================  ===========
affine sym   scales f16                          s, −s·2^(bits−1)             0 … 15, 1 … 255
affine asym  scales f16, zeros u8                s, −s·z                      0 … 2^bits−1
q4_0         scales f16 (may be negative)        d, −8·d                      0 … 15
q8_0         scales f16                          d, −128·d                    1 … 255
q4_1         scales f16, mins f16                d, m                         0 … 15
===========  ==================================  ===========================  ===========

All products are exact in float32 (11-bit significand times at most 8 bits), so ``dequantize`` gives
the same bits as ``s·(q − z)`` and as libggml's ``d·q + m`` with its single rounding.
"""

from __future__ import annotations

__all__ = ["Grid", "Params", "grid_for", "half"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.scheme import Scheme

Params = Mapping[str, Tensor]  # stored grid parameters by name, each [rows, groups]


@dataclass(frozen=True)
class Grid:
    """Codes and their meaning for one scheme."""

    scheme: Scheme

    @property
    def low(self) -> int:
        """Smallest code. Symmetric 8-bit grids keep to −127…127, as llama.cpp's Q8_0 does, so that it can hold them."""
        return 1 if self.scheme.symmetric and self.scheme.bits == 8 else 0

    @property
    def high(self) -> int:
        """Largest code."""
        return int(2**self.scheme.bits - 1)

    @property
    def middle(self) -> int:
        """The code that stands for zero on a symmetric grid."""
        return int(2 ** (self.scheme.bits - 1))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored parameters."""
        if self.scheme.symmetric:
            return ("scales",)
        return ("scales", "zeros" if self.scheme.grid == "affine" else "mins")

    @property
    def tunable(self) -> tuple[str, ...]:
        """The fields that are float16: what may be tuned while codes and whole-numbered fields stay."""
        return tuple(field for field in self.fields if field != "zeros")

    def steps(self, params: Params) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of every group, both [rows, groups] float32."""
        a = params["scales"].float()
        if self.scheme.symmetric:
            return a, a * -self.middle
        if self.scheme.grid == "affine":
            return a, -a * params["zeros"].float()
        return a, params["mins"].float()

    def store(self, a: Tensor, b: Tensor, weight: Tensor | None = None) -> Params:
        """The stored parameters whose steps are nearest to ``a`` and ``b``, both [rows, groups] float32.

        On a symmetric grid ``a`` decides alone. ``weight`` [rows, groups] is how much a group counts where several
        share what is stored.

        Raises:
            InputError: a scale or minimum exceeds float16.
        """
        scales = half(a)
        if self.scheme.symmetric:
            return {"scales": scales}
        if self.scheme.grid != "affine":
            return {"scales": scales, "mins": half(b)}
        stored = scales.float()
        safe = torch.where(stored == 0, torch.ones_like(stored), stored)
        zeros = torch.where(stored == 0, torch.zeros_like(b), -b / safe).round_().clamp_(self.low, self.high)
        return {"scales": scales, "zeros": zeros.to(torch.uint8)}

    def encode(self, values: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Nearest codes of ``values``; ``a`` and ``b`` broadcast against it. Float, whole numbers.

        A group whose step is zero stands for ``b`` alone: its codes are the middle ones.
        """
        safe = torch.where(a == 0, torch.ones_like(a), a)
        codes = torch.round((values - b) / safe).clamp_(self.low, self.high)
        return torch.where(a == 0, torch.full_like(codes, self.middle if self.scheme.symmetric else 0), codes)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Real values of ``codes`` [rows, in_features], float32."""
        a, b = self.steps(params)
        rows, groups = a.shape
        grouped = codes.reshape(rows, groups, -1).float()
        return (grouped * a[:, :, None] + b[:, :, None]).reshape(rows, -1)


def half(values: Tensor) -> Tensor:
    """``values`` rounded to float16.

    Raises:
        InputError: one of them exceeds float16.
    """
    rounded = values.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise InputError(f"a group needs a scale of {float(values.abs().max()):.3g}, beyond float16's 65504")
    return rounded


def grid_for(scheme: Scheme) -> Grid:
    """The grid of ``scheme``."""
    return Grid(scheme)
