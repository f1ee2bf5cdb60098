"""How MatMulNBits and GatherBlockQuantized of ONNX Runtime store a matrix, both ways; the only place that knows.

Up to three tensors a matrix [out, in], w = s·(q − z), blocks of ``g`` consecutive input channels, b = 4 or 8 bits:

=========  =======  ==============================  ==============================================================
tensor     dtype    shape                           content
=========  =======  ==============================  ==============================================================
qweight    uint8    [out, in / g, g · b / 8]        codes along the input, at 4 bits the first in the low nibble
scales     float32  [out · in / g]                  s, of either sign, row by row
zeros      uint8    [out · ⌈in / g · b / 8⌉]        z along the groups, packed as the codes are, every row of its own
=========  =======  ==============================  ==============================================================

A symmetric grid has no ``zeros``: both operators then take z = 2^(b−1). Scales have the type of the activations,
float32 here, which holds every float16. ``g`` is a power of two from 16 up. The half byte behind an odd number of
4-bit zero points is 0 and is not read. Source: the operators' schemas in onnxruntime, core/graph/contrib_ops.
"""

from __future__ import annotations

__all__ = ["FIELDS", "pack_linear", "packed_layout", "packing_refusal", "unpack_linear"]

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.packing import groups_refusal, pack_nibbles, unpack_nibbles
from phi4edge.quant.scheme import Scheme

FIELDS = ("qweight", "scales", "zeros")
_GRIDS = ("affine", "q4_0", "q8_0")
_SMALLEST = 16  # weights in a block


def packing_refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a matrix [out_features, in_features] on ``scheme`` cannot be packed, or None: any out_features can."""
    if scheme.nested:
        return f"{scheme.name} has scales in steps that a super-block shares, and MatMulNBits one scale for each group"
    if scheme.grid not in _GRIDS and not scheme.symmetric:
        return f"{scheme.name} stores a floating-point minimum for each block, and MatMulNBits a whole zero point"
    if scheme.bits not in (4, 8):
        return f"{scheme.name} has {scheme.bits} bits; 4 and 8 are packed here"
    block = _block(scheme, in_features)
    if block < _SMALLEST or block & (block - 1):
        whole = " (a whole row)" if scheme.group_size < 0 else ""
        return f"group_size {block}{whole} is not a power of two from {_SMALLEST} up, as a MatMulNBits block has to be"
    return groups_refusal(block, in_features)


def packed_layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors' name of the dtype, and the shape, of each tensor of a matrix [out_features, in_features]."""
    groups, block = scheme.groups(in_features), _block(scheme, in_features)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "qweight": ("U8", (out_features, groups, block * scheme.bits // 8)),
        "scales": ("F32", (out_features * groups,)),
    }
    if not scheme.symmetric:
        layout["zeros"] = ("U8", (out_features * _zero_bytes(scheme, groups),))
    return layout


def pack_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of ``linear`` in :func:`packed_layout`'s shapes, no code or scale changed.

    Raises:
        InputError: scales that are not float16, which other formats could not hold.
    """
    scheme, scales = linear.scheme, linear.params["scales"]
    if scales.dtype != torch.float16:
        raise InputError(f"{linear.name}: scales are {scales.dtype}, a run has float16")
    shape = packed_layout(scheme, linear.out_features, linear.in_features)["qweight"][1]
    packed = {"qweight": linear.packed().contiguous().reshape(shape), "scales": scales.float().reshape(-1)}
    if not scheme.symmetric:
        packed["zeros"] = _pack(_even(linear.params["zeros"], scheme.bits), scheme.bits).reshape(-1)
    return packed


def unpack_linear(name: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The matrix that tensors in :func:`packed_layout`'s shapes stand for.

    Raises:
        InputError: a scale that is not finite, or that no float16 is.
    """
    rows = tensors["qweight"].shape[0]
    codes = _unpack(tensors["qweight"].reshape(rows, -1), scheme.bits)
    stored = tensors["scales"].reshape(rows, -1)
    scales = stored.to(torch.float16)
    bad = int((~torch.isfinite(stored)).sum())
    if bad:
        raise InputError(f"{name}: {bad} scale(s) are NaN or Inf", "the file is damaged")
    if not torch.equal(scales.float(), stored):
        row, group = (scales.float() != stored).nonzero()[0].tolist()
        raise InputError(
            f"{name}: the scale of row {row}, group {group} is {stored[row, group].item():.9g}, which no float16 is",
            "the file is damaged, or was not written by phi4edge",
        )
    if scheme.symmetric:
        return QuantizedLinear(name, scheme, codes, {"scales": scales})
    zeros = _unpack(tensors["zeros"].reshape(rows, -1), scheme.bits)[:, : scales.shape[1]].contiguous()
    assert int(zeros.max()) <= grid_for(scheme).high
    return QuantizedLinear(name, scheme, codes, {"scales": scales, "zeros": zeros})


def _block(scheme: Scheme, in_features: int) -> int:
    return scheme.group_size if scheme.group_size > 0 else in_features


def _zero_bytes(scheme: Scheme, groups: int) -> int:
    return -(-groups * scheme.bits // 8)


def _even(zeros: Tensor, bits: int) -> Tensor:
    return F.pad(zeros, (0, zeros.shape[1] % 2)) if bits == 4 else zeros


def _pack(values: Tensor, bits: int) -> Tensor:
    return pack_nibbles(values) if bits == 4 else values.contiguous()


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return unpack_nibbles(packed) if bits == 4 else packed
