"""The one definition of every grid: which real numbers a group of codes can stand for.

On every grid here a code ``q`` stands for ``a·q + b``, with ``a`` and ``b`` fixed for a row and a
group, so one solver loop serves all of them. What differs is what is stored for ``a`` and ``b``:

===========  ==================================  ===========================  ===========
grid         stored                              a, b                         codes
===========  ==================================  ===========================  ===========
affine sym   scales f16                          s, −s·2^(bits−1)             0 … 15, 1 … 255
affine asym  scales f16, zeros u8                s, −s·z                      0 … 2^bits−1
q4_0, q5_0   scales f16 (may be negative)        d, −8·d; d, −16·d            0 … 15, 0 … 31
q8_0         scales f16                          d, −128·d                    1 … 255
q4_1, q5_1   scales f16, mins f16                d, m                         0 … 15, 0 … 31
q4_k, q5_k   scales f16, mins f16, sub_scales    d·s, −dmin·m                 0 … 15, 0 … 31
             u8 and sub_mins u8, 0 … 63
q6_k         scales f16, sub_scales i8           d·s, −32·d·s                 0 … 63
===========  ==================================  ===========================  ===========

In the last two, d and dmin are those of a super-block, and the whole numbers s and m those of a group in it.

All products are exact in float32 (11-bit significand times at most 8 bits; d·s·q on the last grid, 11 times 7
times 6), so ``dequantize`` gives the same bits as ``s·(q − z)`` and as libggml's ``d·q + m``, ``d·s·q − dmin·m``
and ``d·s·(q − 32)`` with at most one rounding.
"""

from __future__ import annotations

__all__ = ["Grid", "NestedGrid", "Params", "grid_for", "half", "reciprocal"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.scheme import Scheme

Params = Mapping[str, Tensor]  # stored grid parameters by name, each [rows, groups] or [rows, super-blocks]


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
    def idle(self) -> int:
        """The code in a group whose step is zero."""
        return self.middle if self.scheme.symmetric else 0

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored parameters."""
        if self.scheme.symmetric:
            return ("scales",)
        return ("scales", "zeros" if self.scheme.grid == "affine" else "mins")

    @property
    def tunable(self) -> tuple[str, ...]:
        """The fields that are float16: what may be tuned while codes and whole-numbered fields stay."""
        return tuple(field for field in self.fields if field in ("scales", "mins"))

    def steps(self, params: Params) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of every group, both [rows, groups] float32; differentiable in float32 parameters."""
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

        A group whose step is zero stands for ``b`` alone: its codes are idle.
        """
        safe = torch.where(a == 0, torch.ones_like(a), a)
        codes = (values - b).div_(safe).round_().clamp_(self.low, self.high)
        return codes.masked_fill_(a == 0, self.idle)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Real values of ``codes`` [rows, in_features], float32."""
        a, b = self.steps(params)
        rows, groups = a.shape
        values = codes.reshape(rows, groups, -1).to(torch.float32, copy=True)
        return values.mul_(a[:, :, None]).add_(b[:, :, None]).reshape(rows, -1)


@dataclass(frozen=True)
class NestedGrid(Grid):
    """A grid of super-blocks: the steps of its groups are whole multiples of float16 numbers that they share."""

    @property
    def sub_range(self) -> tuple[int, int]:
        """Smallest and largest whole number that a group stores."""
        return (-128, 127) if self.scheme.symmetric else (0, 63)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored parameters."""
        return ("scales", "sub_scales") if self.scheme.symmetric else ("scales", "mins", "sub_scales", "sub_mins")

    def steps(self, params: Params) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of every group, both [rows, groups] float32; differentiable in float32 parameters."""
        a = _multiples(params["scales"], params["sub_scales"])
        return a, (a * -self.middle if self.scheme.symmetric else -_multiples(params["mins"], params["sub_mins"]))

    def store(self, a: Tensor, b: Tensor, weight: Tensor | None = None) -> Params:
        """The stored parameters whose steps are nearest to ``a`` and ``b``, both [rows, groups] float32.

        Nearest is the least squared error of a·q + b over all codes q, a group weighted by ``weight`` [rows, groups].

        Raises:
            InputError: a scale or minimum exceeds float16.
        """
        rows = a.shape[0]
        shape = (rows, -1, self.scheme.unit // self.scheme.group_size)
        counts = torch.ones_like(a) if weight is None else weight
        counts = counts.reshape(shape)
        scales, sub_scales = _split(a.reshape(shape), counts, *self.sub_range)
        if self.scheme.symmetric:
            return {"scales": half(scales), "sub_scales": sub_scales.reshape(rows, -1).to(torch.int8)}
        # What a lost in storing, b makes good at the middle code.
        lost = a.reshape(shape) - scales[..., None] * sub_scales
        mins, sub_mins = _split(-(b.reshape(shape) + lost * (self.high / 2)), counts, *self.sub_range)
        return {
            "scales": half(scales),
            "mins": half(mins),
            "sub_scales": sub_scales.reshape(rows, -1).to(torch.uint8),
            "sub_mins": sub_mins.reshape(rows, -1).to(torch.uint8),
        }


def _multiples(shared: Tensor, whole: Tensor) -> Tensor:
    """``shared`` [rows, super-blocks] times the ``whole`` numbers [rows, groups] of each: [rows, groups] float32."""
    rows, blocks = shared.shape
    return (shared.float()[:, :, None] * whole.reshape(rows, blocks, -1).float()).reshape(rows, -1)


def _split(wanted: Tensor, weight: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """``wanted`` [..., n] as float16 numbers [...] times whole ones ``low`` … ``high`` [..., n], all float32.

    Σ weight·(wanted − d·k)² is the least of those with the extreme of ``wanted`` on each whole number of the upper
    half of the range (the lower half gives nothing that twice the number and half the d do not), and then with the
    best d for the whole numbers found.

    Raises:
        InputError: d exceeds float16.
    """
    largest, smallest = wanted.amax(-1), wanted.amin(-1)
    furthest = float(torch.maximum(largest, -smallest).max())
    if not furthest <= high * torch.finfo(torch.float16).max:
        raise InputError(f"groups need steps of {furthest:.3g}, beyond {high} times float16's 65504")
    ends = [(torch.where(largest > -smallest, largest, smallest), top) for top in range(high, high // 2, -1)]
    if low < 0:
        ends.append((ends[0][0], low))
    else:  # numbers of the other sign are out of reach, but they may be the larger ones
        ends += [(largest, high), (smallest, high)]
    best = torch.full_like(largest, torch.inf)
    shared, whole = torch.zeros_like(largest), torch.zeros_like(wanted)

    def consider(d: Tensor, k: Tensor | None = None) -> None:
        nonlocal best, shared, whole
        d = d.to(torch.float16).float()
        k = (wanted * reciprocal(d)[..., None]).round_().clamp_(low, high) if k is None else k
        error = (weight * (wanted - d[..., None] * k).square_()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        shared = torch.where(better, d, shared)
        whole = torch.where(better[..., None], k, whole)

    for end, top in ends:
        consider(end / top)
    along, square = (weight * wanted * whole).sum(-1), (weight * whole * whole).sum(-1)
    consider(along * reciprocal(square), whole)
    consider(shared)
    return shared, whole


def reciprocal(values: Tensor) -> Tensor:
    """1 / ``values``, and 0 where they are 0 or so small that this is no float32."""
    inverse = 1 / values
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


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
    return NestedGrid(scheme) if scheme.nested else Grid(scheme)
