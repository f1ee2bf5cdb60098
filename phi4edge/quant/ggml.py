"""GGML's block formats, packed and unpacked bit for bit; the only place that knows their layout.

A row is a sequence of blocks; every field is little-endian, ``d`` and ``m`` are float16 (ggml-common.h):

=====  =======  =====  ===================================================================  =====================
type   weights  bytes  fields                                                               a weight
=====  =======  =====  ===================================================================  =====================
q4_0   32       18     d, 16 bytes: byte j holds weight j (low nibble) and j + 16 (high)    d·(q − 8)
q4_1   32       20     d, m, 16 bytes as in q4_0                                            d·q + m
q8_0   32       34     d, 32 int8                                                           d·q
q6_k   256      210    ql 128, qh 64, int8 scales 16, d (see :func:`pack_q6_k`)             d·scale·(q − 32)
=====  =======  =====  ===================================================================  =====================

``f32``, ``f16`` and ``bf16`` are blocks of one weight. A linear's codes go into a block type as they are
(:func:`packing_refusal` says when they cannot); a group of 32·k weights repeats its scale in k blocks.
"""

from __future__ import annotations

__all__ = [
    "BLOCK_TYPES",
    "BlockType",
    "block_type_of",
    "dequantize",
    "pack_linear",
    "pack_q6_k",
    "packing_refusal",
    "unpack_linear",
    "unpack_q6_k",
]

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme

assert sys.byteorder == "little", "words are viewed as bytes"

_BLOCK = 32  # weights a block of the types that linears are packed into


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
        BlockType("q8_0", 8, 32, 34),
        BlockType("q6_k", 14, 256, 210),
        BlockType("bf16", 30, 1, 2),
    )
}
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def block_type_of(scheme: Scheme) -> BlockType | None:
    """The block type whose codes are those of ``scheme``; None when there is none."""
    if scheme.grid != "affine":
        return BLOCK_TYPES[scheme.grid]
    return BLOCK_TYPES[{4: "q4_0", 8: "q8_0"}[scheme.bits]] if scheme.symmetric and scheme.bits in (4, 8) else None


def packing_refusal(scheme: Scheme, in_features: int) -> str | None:
    """Why rows of ``in_features`` weights on ``scheme`` cannot be packed, or None when they can."""
    if block_type_of(scheme) is None:
        if scheme.symmetric:
            return f"no block type has {scheme.bits}-bit codes with a scale alone"
        return (
            "blocks with an offset (q4_1) store a minimum in float16, and −scale·zero is not exact there; "
            "solve for q4_1 itself"
        )
    group = scheme.group_size if scheme.group_size > 0 else in_features
    if group % _BLOCK:
        return f"group_size {group} is not a multiple of {_BLOCK}, the weights in a block"
    if in_features % group:
        return f"in_features {in_features} is not divisible by group_size {group}"
    return None


def _bytes(values: Tensor) -> Tensor:
    """float16 or int8 [rows, blocks] or [rows, blocks, n] as uint8 [rows, blocks, bytes]."""
    shape = (*values.shape[:2], -1)
    return values.contiguous().reshape(-1).view(torch.uint8).reshape(shape)


def _half(fields: Tensor) -> Tensor:
    """Two bytes a block, uint8 [rows, blocks, 2], as float16 [rows, blocks]."""
    return fields.contiguous().reshape(-1).view(torch.float16).reshape(fields.shape[:2])


def pack_linear(linear: QuantizedLinear) -> Tensor:
    """Blocks of ``linear``: uint8 [out_features, bytes of a row], no code or scale changed.

    Raises:
        InputError: a code or parameter that the block type cannot hold.
    """
    kind = block_type_of(linear.scheme)
    assert kind is not None, f"{linear.scheme.name} was to be refused"
    rows, blocks = linear.out_features, linear.in_features // _BLOCK
    fields = []
    for field in grid_for(GGML_SCHEMES[kind.name]).fields:
        values = linear.params[field]
        if values.dtype != torch.float16:
            raise InputError(f"{linear.name}: {field} are {values.dtype}, a block stores float16")
        fields.append(_bytes(values.repeat_interleave(blocks // values.shape[1], dim=1)))
    codes = linear.codes.reshape(rows, blocks, _BLOCK)
    if kind.name == "q8_0":
        if bool((codes == 0).any()):
            row, column = (linear.codes == 0).nonzero()[0].tolist()
            raise InputError(
                f"{linear.name}: code −128 at row {row}, column {column}; q8_0 blocks have −127 … 127",
                "quantize with --scheme q8_0, which keeps to them",
            )
        fields.append(codes ^ 0x80)  # q − 128 as int8
    else:
        fields.append(codes[..., :16] | (codes[..., 16:] << 4))
    return torch.cat(fields, dim=2).reshape(rows, -1)


def unpack_linear(name: str, kind: BlockType, packed: Tensor, scheme: Scheme | None = None) -> QuantizedLinear:
    """The inverse of :func:`pack_linear` on uint8 [rows, bytes of a row]; ``scheme`` is what was packed.

    Without ``scheme``, or for GGML's own, one scale stands for each block.

    Raises:
        InputError: a scale that is not finite, or blocks of one group of ``scheme`` that differ in scale.
    """
    rows = packed.shape[0]
    block = packed.reshape(rows, -1, kind.nbytes)
    fields = grid_for(GGML_SCHEMES[kind.name]).fields
    params = {field: _half(block[..., 2 * i : 2 * i + 2]) for i, field in enumerate(fields)}
    stored = block[..., 2 * len(fields) :]
    codes = stored ^ 0x80 if kind.name == "q8_0" else torch.cat((stored & 15, stored >> 4), dim=2)
    for field, values in params.items():
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise InputError(f"{name}: {bad} of its {field} are NaN or Inf", "the file is damaged")
    if scheme is None or scheme.grid != "affine":
        return QuantizedLinear(name, GGML_SCHEMES[kind.name], codes.reshape(rows, -1), params)
    groups = scheme.groups(codes.shape[1] * _BLOCK, name)
    repeated = params["scales"].reshape(rows, groups, -1)
    if not torch.equal(repeated, repeated[..., :1].expand_as(repeated)):
        raise InputError(
            f"{name}: blocks of one group differ in scale, so the codes are not {scheme.name}", "the file is damaged"
        )
    return QuantizedLinear(name, scheme, codes.reshape(rows, -1), {"scales": repeated[..., 0].contiguous()})


def pack_q6_k(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """Q6_K blocks, uint8 [rows, bytes of a row].

    ``codes`` [rows, in_features] uint8 0…63, ``scales`` [rows, in_features/16] int8, ``d`` [rows, in_features/256]
    float16. In each half of a block, with q₀…q₃ its four runs of 32 codes: ql = low nibbles of q₀|q₂, then of
    q₁|q₃; qh = the upper two bits of all four, q₀ lowest.
    """
    rows, blocks = d.shape
    q = codes.reshape(rows, blocks, 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = low[..., :2, :] | (low[..., 2:, :] << 4)
    qh = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    fields = (ql.reshape(rows, blocks, 128), qh.reshape(rows, blocks, 64), _bytes(scales.reshape(rows, blocks, 16)))
    return torch.cat((*fields, _bytes(d)), dim=2).reshape(rows, -1)


def unpack_q6_k(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`pack_q6_k`: codes, scales, d."""
    rows = packed.shape[0]
    block = packed.reshape(rows, -1, BLOCK_TYPES["q6_k"].nbytes)
    blocks = block.shape[1]
    ql = block[..., :128].reshape(rows, blocks, 2, 2, 32)
    qh = block[..., 128:192].reshape(rows, blocks, 2, 1, 32)
    high = torch.cat([(qh >> shift) & 3 for shift in (0, 2, 4, 6)], dim=3)
    codes = torch.cat((ql & 15, ql >> 4), dim=3) | (high << 4)
    scales = block[..., 192:208].contiguous().view(torch.int8)
    return codes.reshape(rows, -1), scales.reshape(rows, -1), _half(block[..., 208:])


def dequantize(kind: BlockType, packed: Tensor) -> Tensor:
    """What uint8 [rows, bytes of a row] stands for, [rows, in_features] float32, as libggml computes it."""
    if kind.name in _FLOATS:
        dtype = _FLOATS[kind.name]
        return packed.contiguous().reshape(-1).view(dtype).reshape(packed.shape[0], -1).float()
    if kind.name == "q6_k":
        codes, scales, d = unpack_q6_k(packed)
        rows, blocks = d.shape
        step = d.float()[:, :, None] * scales.reshape(rows, blocks, 16).float()  # exact: 11 and 8 bits
        return ((codes.reshape(rows, blocks, 16, 16).float() - 32) * step[..., None]).reshape(rows, -1)
    return unpack_linear("tensor", kind, packed).dequantize()
