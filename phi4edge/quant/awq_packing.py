"""How an AWQ checkpoint of version "gemm" stores a linear, in both directions; the only place that knows.

Three tensors a linear, w = s·(q − z), 4 bits, words int32:

=========  =======  =================  =================================================
tensor     dtype    shape              content
=========  =======  =================  =================================================
qweight    int32    [in, out / 8]      codes, eight output channels to a word
qzeros     int32    [groups, out / 8]  zero points as they are, in the same order
scales     float16  [groups, out]      s, of either sign
=========  =======  =================  =================================================

Nibble i of a word, the lowest first, holds channel 8·c + (0, 2, 4, 6, 1, 3, 5, 7)[i]: the order in which AutoAWQ's
kernel unpacks pairs of halves. A symmetric grid has its zero point 8 spelled out, as the kernels always subtract one.
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

FIELDS = ("qweight", "qzeros", "scales")
GRIDS = ("affine", "q4_0")
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the channel that each nibble holds
_PER_WORD = len(ORDER)


def packing_refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a matrix [out_features, in_features] on ``scheme`` cannot be packed, or None when it can."""
    if scheme.nested:
        return f"{scheme.name} has scales in steps that a super-block shares, and AWQ one float16 for each group"
    if scheme.bits != BITS:
        return f"{scheme.name} has {scheme.bits} bits; AWQ's kernels know 4"
    if scheme.grid not in GRIDS:
        return f"{scheme.name} stores a floating-point minimum for each block, and an AWQ zero point is a whole number"
    return words_refusal(BITS, {"out_features": out_features}) or groups_refusal(scheme.group_size, in_features)


def packed_layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtype and shape of each of :data:`FIELDS` for a matrix [out_features, in_features]."""
    groups = scheme.groups(in_features)
    return {
        "qweight": ("I32", (in_features, out_features // _PER_WORD)),
        "qzeros": ("I32", (groups, out_features // _PER_WORD)),
        "scales": ("F16", (groups, out_features)),
    }


def _interleaved(values: Tensor) -> Tensor:
    """``values`` [out, n] uint8 to words [n, out/8] int32, eight channels to a word in AWQ's order."""
    eights = values.t().reshape(values.shape[1], -1, _PER_WORD)
    return pack_words(eights[..., list(ORDER)].reshape(values.shape[1], -1), BITS)


def _channels(words: Tensor) -> Tensor:
    """The inverse of :func:`_interleaved`: [n, out/8] int32 to [out, n] uint8, contiguous."""
    eights = unpack_words(words, BITS).reshape(words.shape[0], -1, _PER_WORD)
    place = [ORDER.index(channel) for channel in range(_PER_WORD)]
    # A copy in any case: of one column, a transpose counts as contiguous with whatever strides it has.
    return eights[..., place].reshape(words.shape[0], -1).t().clone(memory_format=torch.contiguous_format)


def pack_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The three tensors of ``linear``.

    Raises:
        InputError: a zero point beyond 4 bits, or scales that are not float16.
    """
    scales = linear.params["scales"]
    if scales.dtype != torch.float16:
        raise InputError(f"{linear.name}: scales are {scales.dtype}, an AWQ checkpoint stores float16")
    if linear.scheme.symmetric:
        zeros = torch.full_like(scales, grid_for(linear.scheme).middle, dtype=torch.uint8)
    else:
        zeros = linear.params["zeros"]
        if int(zeros.max()) >= 2**BITS:
            raise InputError(f"{linear.name}: zero points up to {int(zeros.max())}, the format stores 0 to 15")
    return {
        "qweight": _interleaved(linear.codes),
        "qzeros": _interleaved(zeros),
        "scales": scales.t().contiguous(),
    }


def unpack_linear(name: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The linear that three tensors in :func:`packed_layout`'s shapes stand for.

    Raises:
        InputError: a scale that is not finite, or zero points off the middle on a symmetric grid.
    """
    scales = tensors["scales"].t().clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(scales).all()):
        raise InputError(f"{name}: {int((~torch.isfinite(scales)).sum())} scale(s) are NaN or Inf", "file damaged")
    codes, zeros = _channels(tensors["qweight"]), _channels(tensors["qzeros"])
    if not scheme.symmetric:
        return QuantizedLinear(name, scheme, codes, {"scales": scales, "zeros": zeros})
    middle = grid_for(scheme).middle
    if bool((zeros != middle).any()):
        raise InputError(
            f"{name}: zero point {int(zeros[zeros != middle][0])}, a symmetric 4-bit grid has {middle} throughout",
            "the file is damaged, or meta.scheme in its config is wrong",
        )
    return QuantizedLinear(name, scheme, codes, {"scales": scales})
