"""How compressed-tensors' "pack-quantized" stores a linear, in both directions; the only place that knows.

w = s·(q − z). Codes and zero points are signed there, q − 2^(bits−1) and z − 2^(bits−1), and packed with that much
added: what lies in the words is q and z. Packed words are int32, the lowest index in the lowest bits.

=================  =======  =========================  ================================================
tensor             dtype    shape (p = 32 / bits)      content
=================  =======  =========================  ================================================
weight_packed      int32    [out, in / p]              codes, p consecutive input channels to a word
weight_shape       int64    [2]                        out, in
weight_scale       float16  [out, groups]              s, of either sign
weight_zero_point  int32    [out / p, groups]          zero points, p output channels to a word; only
                                                       on an asymmetric grid
=================  =======  =========================  ================================================

The symmetric 8-bit codes 1 … 255 are −127 … 127 there. ``weight_shape`` stands second because its eight bytes a number
must lie aligned in a safetensors file, and whole rows of words are a multiple of eight bytes.
"""

from __future__ import annotations

__all__ = ["FIELDS", "pack_linear", "packed_layout", "packing_refusal", "unpack_linear"]

from collections.abc import Mapping

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.packing import groups_refusal, pack_words, unpack_words, words_refusal
from phi4edge.quant.scheme import Scheme

FIELDS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point")
GRIDS = ("affine", "q4_0", "q8_0")


def packing_refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a matrix [out_features, in_features] on ``scheme`` cannot be packed, or None when it can."""
    if scheme.nested:
        return f"{scheme.name} has scales in steps that a super-block shares; here a group has one float16"
    if scheme.grid not in GRIDS and not scheme.symmetric:
        return f"{scheme.name} stores a floating-point minimum for each block; here a zero point is a whole number"
    if scheme.bits not in (4, 8):
        return f"{scheme.name} has {scheme.bits} bits; vLLM's kernels know 4 and 8"
    axes = {"in_features": in_features, "out_features": out_features}
    return words_refusal(scheme.bits, axes) or groups_refusal(scheme.group_size, in_features)


def packed_layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtype and shape of each of :data:`FIELDS` that a matrix [out_features, in_features] has."""
    groups, per_word = scheme.groups(in_features), 32 // scheme.bits
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight_packed": ("I32", (out_features, in_features // per_word)),
        "weight_shape": ("I64", (2,)),
        "weight_scale": ("F16", (out_features, groups)),
    }
    if not scheme.symmetric:
        layout["weight_zero_point"] = ("I32", (out_features // per_word, groups))
    return layout


def pack_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of ``linear``.

    Raises:
        InputError: a zero point that the format cannot store, or scales that are not float16.
    """
    scheme, scales = linear.scheme, linear.params["scales"]
    if scales.dtype != torch.float16:
        raise InputError(f"{linear.name}: scales are {scales.dtype}, this format's are float16")
    packed = {
        "weight_packed": linear.words(),
        "weight_shape": torch.tensor([linear.out_features, linear.in_features], dtype=torch.int64),
        "weight_scale": scales.contiguous(),
    }
    if not scheme.symmetric:
        zeros, highest = linear.params["zeros"], grid_for(scheme).high
        if int(zeros.max()) > highest:
            raise InputError(f"{linear.name}: zero points up to {int(zeros.max())}, the format stores 0 to {highest}")
        packed["weight_zero_point"] = pack_words(zeros.t().contiguous(), scheme.bits).t().contiguous()
    return packed


def unpack_linear(name: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The linear that tensors in :func:`packed_layout`'s shapes stand for.

    Raises:
        InputError: a scale that is not finite, or another shape than announced.
    """
    codes, scales = unpack_words(tensors["weight_packed"], scheme.bits), tensors["weight_scale"]
    if tensors["weight_shape"].tolist() != list(codes.shape):
        raise InputError(
            f"{name}: weight_shape is {tensors['weight_shape'].tolist()}, weight_packed holds {list(codes.shape)}"
        )
    if not bool(torch.isfinite(scales).all()):
        raise InputError(f"{name}: {int((~torch.isfinite(scales)).sum())} scale(s) are NaN or Inf", "file damaged")
    if scheme.symmetric:
        return QuantizedLinear(name, scheme, codes, {"scales": scales})
    zeros = unpack_words(tensors["weight_zero_point"].t(), scheme.bits).t().clone(memory_format=torch.contiguous_format)
    return QuantizedLinear(name, scheme, codes, {"scales": scales, "zeros": zeros})
