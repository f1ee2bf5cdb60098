"""How a GPTQ checkpoint stores a linear, in both directions; the only place that knows.

Four tensors a linear, w = s·(q − z), all packed words int32 with the lowest index in the lowest bits:

=========  =======  ==========================  =====================================================
tensor     dtype    shape (p = 32 / bits)       content
=========  =======  ==========================  =====================================================
qweight    int32    [in / p, out]               codes, p consecutive input channels to a word
qzeros     int32    [groups, out / p]           zero points less the offset, p output channels to a word
scales     float16  [groups, out]               s, of either sign
g_idx      int32    [in]                        group of each input channel: k // group_size
=========  =======  ==========================  =====================================================

The offset is 1 in format v1 ("gptq") and 0 in v2 ("gptq_v2"). A symmetric grid has z = 2^(bits−1)
throughout. v1 wraps z = 0 to the largest code, and readers differ in what they make of that (some
add the 1 to whole words, so the carry spoils the neighbour), so z = 0 belongs into v2.
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

FIELDS = ("qweight", "qzeros", "scales", "g_idx")
GRIDS = ("affine", "q4_0", "q8_0")


def packing_refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a matrix [out_features, in_features] on ``scheme`` cannot be packed, or None when it can."""
    if scheme.nested:
        return f"{scheme.name} has scales in steps that a super-block shares, and GPTQ one float16 for each group"
    if scheme.grid not in GRIDS and not scheme.symmetric:
        return f"{scheme.name} stores a floating-point minimum for each block, and a GPTQ zero point is a whole number"
    if scheme.bits not in (4, 8):
        return f"{scheme.name} has {scheme.bits} bits; 4 and 8 are packed here"
    axes = {"in_features": in_features, "out_features": out_features}
    return words_refusal(scheme.bits, axes) or groups_refusal(scheme.group_size, in_features)


def packed_layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtype and shape of each of :data:`FIELDS` for a matrix [out_features, in_features]."""
    groups, per_word = scheme.groups(in_features), 32 // scheme.bits
    return {
        "qweight": ("I32", (in_features // per_word, out_features)),
        "qzeros": ("I32", (groups, out_features // per_word)),
        "scales": ("F16", (groups, out_features)),
        "g_idx": ("I32", (in_features,)),
    }


def _group_index(scheme: Scheme, in_features: int) -> Tensor:
    size = scheme.group_size if scheme.group_size > 0 else in_features
    return (torch.arange(in_features) // size).to(torch.int32)


def _zeros(linear: QuantizedLinear) -> Tensor:
    """Zero points [out_features, groups] uint8, those of a symmetric grid spelled out."""
    if linear.scheme.symmetric:
        return torch.full_like(linear.params["scales"], grid_for(linear.scheme).middle, dtype=torch.uint8)
    return linear.params["zeros"]


def pack_linear(linear: QuantizedLinear, zero_offset: int) -> dict[str, Tensor]:
    """The four tensors of ``linear``; ``zero_offset`` is 1 for format v1, 0 for v2.

    Raises:
        InputError: a zero point that the format cannot store, or scales that are not float16.
    """
    scheme, scales, zeros = linear.scheme, linear.params["scales"], _zeros(linear)
    highest = grid_for(scheme).high
    if scales.dtype != torch.float16:
        raise InputError(f"{linear.name}: scales are {scales.dtype}, a GPTQ checkpoint stores float16")
    low, high = int(zeros.min()), int(zeros.max())
    if low < zero_offset or high > highest:
        raise InputError(
            f"{linear.name}: zero points from {low} to {high}, the format stores {zero_offset} to {highest}"
        )
    return {
        "qweight": linear.words().t().contiguous(),
        "qzeros": pack_words((zeros.to(torch.uint8) - zero_offset).t().contiguous(), scheme.bits),
        "scales": scales.t().contiguous(),
        "g_idx": _group_index(scheme, linear.in_features),
    }


def unpack_linear(name: str, scheme: Scheme, tensors: Mapping[str, Tensor], zero_offset: int) -> QuantizedLinear:
    """The linear that four tensors in :func:`packed_layout`'s shapes stand for.

    Raises:
        InputError: channels in another order than their groups', a scale that is not finite, or zero
            points off the middle on a symmetric grid.
    """
    codes = unpack_words(tensors["qweight"].t(), scheme.bits)
    if not torch.equal(tensors["g_idx"], _group_index(scheme, codes.shape[1])):
        raise InputError(
            f"{name}: g_idx is not k // {scheme.group_size}",
            "codes in activation order (desc_act) have no place in the other formats; quantize without it",
        )
    scales = tensors["scales"].t().clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(scales).all()):
        raise InputError(f"{name}: {int((~torch.isfinite(scales)).sum())} scale(s) are NaN or Inf", "file damaged")
    grid = grid_for(scheme)
    zeros = unpack_words(tensors["qzeros"], scheme.bits).t().clone(memory_format=torch.contiguous_format)
    zeros = (zeros + zero_offset) & grid.high
    if not scheme.symmetric:
        return QuantizedLinear(name, scheme, codes, {"scales": scales, "zeros": zeros})
    if bool((zeros != grid.middle).any()):
        found = int(zeros[zeros != grid.middle][0])
        raise InputError(
            f"{name}: zero point {found}, a symmetric {scheme.bits}-bit grid has {grid.middle} throughout",
            "the file is damaged, or checkpoint_format or sym in its config is wrong",
        )
    return QuantizedLinear(name, scheme, codes, {"scales": scales})
