"""GGML's block types, and where in a block each field lies; the only place that knows.

A row is a sequence of blocks; every field is little-endian, ``d``, ``dmin`` and ``m`` are float16 (ggml-common.h):

=====  =======  =====  ======================================================================  =================
type   weights  bytes  fields                                                                  a weight
=====  =======  =====  ======================================================================  =================
q4_0   32       18     d, 16 bytes: byte j holds weight j (low nibble) and j + 16 (high)       d·(q − 8)
q4_1   32       20     d, m, 16 bytes as in q4_0                                               d·q + m
q5_0   32       22     d, 4 bytes: bit i is the fifth of weight i, 16 bytes as in q4_0         d·(q − 16)
q5_1   32       24     d, m, 4 and 16 bytes as in q5_0                                         d·q + m
q8_0   32       34     d, 32 int8                                                              d·q
q4_k   256      144    d, dmin, 12 bytes s and m (:func:`_pack_sixes`), 128 bytes of nibbles   d·s·q − dmin·m
q5_k   256      176    d, dmin, 12 bytes s and m, 32 bytes of fifth bits, 128 as in q4_k       d·s·q − dmin·m
q6_k   256      210    ql 128, qh 64, int8 scales s 16, d                                      d·s·(q − 32)
=====  =======  =====  ======================================================================  =================

K types have 6-bit s and m for each 32 weights, q6_k an int8 s for each 16. Their weights are taken 32 at a time,
in runs r₀, r₁, …, byte j of 32 holding something of weight j of each run:

* q4_k: nibbles r₀|r₁, r₂|r₃, … (low | high), and q5_k's byte of fifth bits has that of run k in bit k;
* q6_k, in each half: ql = low nibbles r₀|r₂, then r₁|r₃; qh = the upper two bits of all four, r₀ lowest.

``f32``, ``f16`` and ``bf16`` are blocks of one weight.
"""

from __future__ import annotations

__all__ = ["BLOCK_TYPES", "NIBBLES", "BlockType", "pack_blocks", "pack_nibble_blocks", "unpack_blocks"]

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.quant._block_kernels import put_nibbles
from phi4edge.quant.grid import Params
from phi4edge.quant.packing import pack_nibbles

assert sys.byteorder == "little", "words are viewed as bytes"


@dataclass(frozen=True)
class BlockType:
    """One tensor type of GGML."""

    name: str
    code: int  # enum ggml_type, GGUF's tensor type
    weights: int  # a block
    nbytes: int  # a block

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row of ``in_features`` weights, a whole number of blocks."""
        assert in_features % self.weights == 0, f"{in_features} weights are not whole {self.name} blocks"
        return in_features // self.weights * self.nbytes


BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("f32", 0, 1, 4),
        BlockType("f16", 1, 1, 2),
        BlockType("q4_0", 2, 32, 18),
        BlockType("q4_1", 3, 32, 20),
        BlockType("q5_0", 6, 32, 22),
        BlockType("q5_1", 7, 32, 24),
        BlockType("q8_0", 8, 32, 34),
        BlockType("q4_k", 12, 256, 144),
        BlockType("q5_k", 13, 256, 176),
        BlockType("q6_k", 14, 256, 210),
        BlockType("bf16", 30, 1, 2),
    )
}


NIBBLES = ("q4_0", "q4_1")  # types of half a byte a code and nothing else but float16 numbers


def pack_nibble_blocks(kind: BlockType, nibbles: Tensor, params: Params) -> Tensor:
    """The same as :func:`pack_blocks` of one of :data:`NIBBLES`, of codes two to a byte, [rows, in_features / 2].

    The first code of a byte is the low one. One pass over the bytes, on the CPU.
    """
    rows = nibbles.shape[0]
    halves = torch.cat([_bytes(params[field]) for field in ("scales", "mins") if field in params], dim=2)
    first = halves.reshape(-1, halves.shape[-1]).numpy()
    return torch.from_numpy(put_nibbles(nibbles.reshape(-1, kind.weights // 2).numpy(), first)).reshape(rows, -1)


def pack_blocks(kind: BlockType, codes: Tensor, params: Params) -> Tensor:
    """Blocks of ``codes`` [rows, in_features] uint8, as uint8 [rows, bytes of a row].

    ``params`` are those of the scheme that ``kind`` is called after, one float16 a block and its whole numbers.
    """
    if kind.name in NIBBLES:
        return pack_nibble_blocks(kind, pack_nibbles(codes), params)
    rows = codes.shape[0]
    q = codes.reshape(rows, -1, kind.weights)
    halves = [_bytes(params[field]) for field in ("scales", "mins") if field in params]
    if kind.name == "q8_0":
        fields = [*halves, q ^ 0x80]  # q − 128 as int8
    elif kind.name in ("q5_0", "q5_1"):
        fields = [*halves, _pack_bits(_parts(q >> 4, 4, 8)), _pack_runs(q, 16)]
    elif kind.name == "q6_k":
        scales = params["sub_scales"].reshape(rows, -1, 16)
        fields = [*_pack_q6_k(q), _bytes(scales), *halves]
    else:
        sixes = _pack_sixes(*(params[field].reshape(rows, -1, 8) for field in ("sub_scales", "sub_mins")))
        fifths = [_pack_bits(_parts(q >> 4, 8, 32).mT)] if kind.name == "q5_k" else []
        fields = [*halves, sixes, *fifths, _pack_runs(q, 32)]
    return torch.cat(fields, dim=2).reshape(rows, -1)


def unpack_blocks(kind: BlockType, packed: Tensor) -> tuple[Tensor, Params]:
    """The inverse of :func:`pack_blocks` on uint8 [rows, bytes of a row]: codes and parameters."""
    rows = packed.shape[0]
    block = packed.reshape(rows, -1, kind.nbytes)
    params: dict[str, Tensor] = {}

    def take(nbytes: int) -> Tensor:
        nonlocal block
        field, block = block[..., :nbytes], block[..., nbytes:]
        return field

    def take_halves(*fields: str) -> None:
        for field in fields:
            params[field] = take(2).contiguous().reshape(-1).view(torch.float16).reshape(rows, -1)

    if kind.name == "q8_0":
        take_halves("scales")
        q = take(32) ^ 0x80
    elif kind.name in NIBBLES:
        take_halves(*("scales", "mins")[: 1 if kind.name == "q4_0" else 2])
        q = _unpack_runs(take(16), 16)
    elif kind.name in ("q5_0", "q5_1"):
        take_halves(*("scales", "mins")[: 1 if kind.name == "q5_0" else 2])
        fifth = _unpack_bits(take(4)).flatten(2)
        q = _unpack_runs(take(16), 16) | (fifth << 4)
    elif kind.name == "q6_k":
        q = _unpack_q6_k(take(128), take(64))
        params["sub_scales"] = take(16).contiguous().view(torch.int8).reshape(rows, -1)
        take_halves("scales")
    else:
        take_halves("scales", "mins")
        params["sub_scales"], params["sub_mins"] = (part.reshape(rows, -1) for part in _unpack_sixes(take(12)))
        fifths = [_unpack_bits(take(32)).mT.flatten(2)] if kind.name == "q5_k" else []
        q = _unpack_runs(take(128), 32)
        for fifth in fifths:
            q = q | (fifth << 4)
    return q.reshape(rows, -1), params


def _bytes(values: Tensor) -> Tensor:
    """float16 or int8 [rows, blocks] or [rows, blocks, n] as uint8 [rows, blocks, bytes]."""
    shape = (*values.shape[:2], -1)
    return values.contiguous().reshape(-1).view(torch.uint8).reshape(shape)


def _parts(fields: Tensor, *shape: int) -> Tensor:
    """[rows, blocks, n] as [rows, blocks, *shape]."""
    return fields.reshape(*fields.shape[:2], *shape)


def _pack_runs(q: Tensor, run: int) -> Tensor:
    """Low nibbles of every two runs of ``run`` codes, the first of them in the low half of a byte."""
    pairs = _parts(q, -1, 2, run) & 15
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(2)


def _unpack_runs(packed: Tensor, run: int) -> Tensor:
    pairs = _parts(packed, -1, 1, run)
    return torch.cat((pairs & 15, pairs >> 4), dim=3).flatten(2)


def _pack_bits(bits: Tensor) -> Tensor:
    """0 and 1 [rows, blocks, n, 8] as bytes [rows, blocks, n], the first in the lowest bit."""
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    return (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1


def _pack_sixes(s: Tensor, m: Tensor) -> Tensor:
    """6-bit numbers s and m [rows, blocks, 8] as 12 bytes: s₀…₃, m₀…₃, and s₄…₇|m₄…₇ in nibbles, whose upper two
    bits are in those of s₀…₃ and m₀…₃ (get_scale_min_k4 of ggml-quants.c).
    """
    first_s, last_s, first_m, last_m = s[..., :4], s[..., 4:], m[..., :4], m[..., 4:]
    upper_s, upper_m = (last_s >> 4) << 6, (last_m >> 4) << 6
    return torch.cat((first_s | upper_s, first_m | upper_m, (last_s & 15) | ((last_m & 15) << 4)), dim=2)


def _unpack_sixes(packed: Tensor) -> tuple[Tensor, Tensor]:
    first_s, first_m, nibbles = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    last_s, last_m = (nibbles & 15) | ((first_s >> 6) << 4), (nibbles >> 4) | ((first_m >> 6) << 4)
    return torch.cat((first_s & 63, last_s), dim=2), torch.cat((first_m & 63, last_m), dim=2)


def _pack_q6_k(q: Tensor) -> tuple[Tensor, Tensor]:
    runs = _parts(q, 2, 4, 32)
    low, high = runs & 15, runs >> 4
    ql = low[..., :2, :] | (low[..., 2:, :] << 4)
    qh = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    return ql.flatten(2), qh.flatten(2)


def _unpack_q6_k(low: Tensor, high: Tensor) -> Tensor:
    ql, qh = _parts(low, 2, 2, 32), _parts(high, 2, 1, 32)
    upper = torch.cat([(qh >> shift) & 3 for shift in (0, 2, 4, 6)], dim=3)
    return (torch.cat((ql & 15, ql >> 4), dim=3) | (upper << 4)).flatten(2)
