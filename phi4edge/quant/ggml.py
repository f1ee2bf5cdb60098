"""Linears as blocks of GGML, bit for bit and in both directions.

Where the fields lie in a block is :mod:`phi4edge.quant.ggml_blocks`' to know. A linear's codes go into a block type
as they are (:func:`packing_refusal` says when they cannot); a group of 32·k weights repeats its scale in k blocks.
"""

from __future__ import annotations

__all__ = [
    "BLOCK_TYPES",
    "BlockType",
    "block_type_of",
    "dequantize",
    "pack_linear",
    "packing_refusal",
    "unpack_linear",
]

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.ggml_blocks import (
    BLOCK_TYPES,
    NIBBLES,
    BlockType,
    pack_blocks,
    pack_nibble_blocks,
    unpack_blocks,
)
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def block_type_of(scheme: Scheme) -> BlockType | None:
    """The block type whose codes are those of ``scheme``; None when there is none."""
    if scheme.grid != "affine":
        return BLOCK_TYPES[scheme.grid]
    return BLOCK_TYPES[{4: "q4_0", 8: "q8_0"}[scheme.bits]] if scheme.symmetric and scheme.bits in (4, 8) else None


def packing_refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a matrix [out_features, in_features] on ``scheme`` cannot be packed, or None: any out_features can."""
    if block_type_of(scheme) is None:
        if scheme.symmetric:
            return f"no block type has {scheme.bits}-bit codes with a scale alone"
        return (
            "blocks with an offset (q4_1) store a minimum in float16, and −scale·zero is not exact there; "
            "solve for q4_1 itself"
        )
    blocks = BLOCK_TYPES["q4_0"].weights if scheme.grid == "affine" else scheme.unit
    unit = scheme.unit if scheme.unit > 0 else in_features
    if unit % blocks:
        return f"group_size {unit} is not a multiple of {blocks}, the weights in a block"
    if in_features % unit:
        name = f"{unit}, the weights in a {scheme.name} super-block" if scheme.nested else f"group_size {unit}"
        return f"in_features {in_features} is not divisible by {name}"
    return None


def pack_linear(linear: QuantizedLinear) -> Tensor:
    """Blocks of ``linear``: uint8 [out_features, bytes of a row], no code or scale changed.

    Raises:
        InputError: a code or parameter that the block type cannot hold.
    """
    kind = block_type_of(linear.scheme)
    assert kind is not None, f"{linear.scheme.name} was to be refused"
    grid, blocks = grid_for(GGML_SCHEMES[kind.name]), linear.in_features // kind.weights
    params = dict(linear.params)
    for field in grid.tunable:
        values = params[field]
        if values.dtype != torch.float16:
            raise InputError(f"{linear.name}: {field} are {values.dtype}, a block stores float16")
        params[field] = values.repeat_interleave(blocks // values.shape[1], dim=1)
    if kind.name == "q8_0" and bool((linear.codes == 0).any()):
        row, column = (linear.codes == 0).nonzero()[0].tolist()
        raise InputError(
            f"{linear.name}: code −128 at row {row}, column {column}; q8_0 blocks have −127 … 127",
            "quantize with --scheme q8_0, which keeps to them",
        )
    if kind.name in NIBBLES:
        return pack_nibble_blocks(kind, linear.packed(), params)
    return pack_blocks(kind, linear.codes, params)


def unpack_linear(name: str, kind: BlockType, packed: Tensor, scheme: Scheme | None = None) -> QuantizedLinear:
    """The inverse of :func:`pack_linear` on uint8 [rows, bytes of a row]; ``scheme`` is what was packed.

    Without ``scheme``, or for GGML's own, one scale stands for each block.

    Raises:
        InputError: a scale that is not finite, or blocks of one group of ``scheme`` that differ in scale.
    """
    codes, params = unpack_blocks(kind, packed)
    for field in grid_for(GGML_SCHEMES[kind.name]).tunable:
        bad = int((~torch.isfinite(params[field])).sum())
        if bad:
            raise InputError(f"{name}: {bad} of its {field} are NaN or Inf", "the file is damaged")
    if scheme is None or scheme.grid != "affine":
        return QuantizedLinear(name, GGML_SCHEMES[kind.name], codes, params)
    repeated = params["scales"].reshape(codes.shape[0], scheme.groups(codes.shape[1], name), -1)
    if not torch.equal(repeated, repeated[..., :1].expand_as(repeated)):
        raise InputError(
            f"{name}: blocks of one group differ in scale, so the codes are not {scheme.name}", "the file is damaged"
        )
    return QuantizedLinear(name, scheme, codes, {"scales": repeated[..., 0].contiguous()})


def dequantize(kind: BlockType, packed: Tensor) -> Tensor:
    """What uint8 [rows, bytes of a row] stands for, [rows, in_features] float32, as libggml computes it."""
    if kind.name in _FLOATS:
        dtype = _FLOATS[kind.name]
        return packed.contiguous().reshape(-1).view(dtype).reshape(packed.shape[0], -1).float()
    return unpack_linear("tensor", kind, packed).dequantize()
