"""How MLX stores a linear (its "affine" mode), in both directions; the only place that knows.

w = s·q + b, with s and b a floating-point number each for a group of 32, 64 or 128 input channels:

=======  ==================  ====================  ===========================================================
tensor   dtype               shape                 content
=======  ==================  ====================  ===========================================================
weight   uint32              [out, in·bits / 32]   codes along the input, one stream of bits, the lowest first
scales   float16 or float32  [out, groups]         s
biases   the same            [out, groups]         b
=======  ==================  ====================  ===========================================================

Every grid here gives b without another rounding, or is refused:

- symmetric: b = −2^(bits−1)·s. A power of two times a float16 is a float16 unless it overflows (|s| > 8188 at 4 bits,
  511 at 8), which is refused.
- q4_1, q5_1: s and b are the stored scale and minimum.
- affine with zero points: b = −s·z has up to 19 significant bits, so scales and biases are both float32. A group of
  scale 0 would lose its zero point, and is refused unless that is 0, as solvers leave it.

5 and 6 bits (:func:`~phi4edge.quant.packing.pack_bytes`) lie across words, eight codes to five or six bytes.
"""

from __future__ import annotations

__all__ = ["FIELDS", "GROUP_SIZES", "pack_linear", "packed_layout", "packing_refusal", "unpack_linear"]

from collections.abc import Mapping

import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.packing import groups_refusal, unpack_words
from phi4edge.quant.scheme import Scheme

FIELDS = ("weight", "scales", "biases")
GROUP_SIZES = (32, 64, 128)


def _has_zeros(scheme: Scheme) -> bool:
    return "zeros" in grid_for(scheme).fields


def packing_refusal(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why a matrix [out_features, in_features] on ``scheme`` cannot be packed, or None when it can."""
    if scheme.nested:
        return f"{scheme.name} has scales in steps that a super-block shares, and MLX a scale and a bias for each group"
    if scheme.group_size not in GROUP_SIZES:
        found = "a scale for a whole row" if scheme.group_size < 0 else f"groups of {scheme.group_size}"
        return f"{scheme.name} has {found}, and MLX groups of {', '.join(map(str, GROUP_SIZES))}"
    return groups_refusal(scheme.group_size, in_features)


def packed_layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtype and shape of each of :data:`FIELDS` for a matrix [out_features, in_features]."""
    shape, dtype = (out_features, scheme.groups(in_features)), "F32" if _has_zeros(scheme) else "F16"
    return {
        "weight": ("U32", (out_features, in_features * scheme.bits // 32)),
        "scales": (dtype, shape),
        "biases": (dtype, shape),
    }


def pack_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The three tensors of ``linear``.

    Raises:
        InputError: a bias that float16 cannot hold, a zero point that would be lost, or scales that are not float16.
    """
    scheme, scales = linear.scheme, linear.params["scales"]
    if scales.dtype != torch.float16:
        raise InputError(f"{linear.name}: scales are {scales.dtype}, here they are float16")
    if scheme.symmetric:
        biases = (scales.float() * -grid_for(scheme).middle).half()
        if not bool(torch.isfinite(biases).all()):
            raise InputError(
                f"{linear.name}: scale {float(scales.abs().max()):.6g} has the bias "
                f"{-grid_for(scheme).middle} times that, beyond float16's 65504",
                "weights this large are damage in most cases; GGUF and GPTQ hold them",
            )
    elif _has_zeros(scheme):
        zeros = linear.params["zeros"]
        lost = (scales == 0) & (zeros != 0)
        if bool(lost.any()):
            raise InputError(
                f"{linear.name}: {int(lost.sum())} group(s) of scale 0 have a zero point other than 0, "
                "which MLX has no place for",
                "awq and compressed_tensors hold them",
            )
        scales = scales.float()
        biases = -(scales * zeros.float())
    else:
        biases = linear.params["mins"]
    return {
        "weight": linear.words().view(torch.uint32),
        "scales": scales.contiguous(),
        "biases": biases.contiguous(),
    }


def unpack_linear(name: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The linear that three tensors in :func:`packed_layout`'s shapes stand for.

    Raises:
        InputError: a scale or bias that is not finite, or that no parameter of the grid gives.
    """
    codes = unpack_words(tensors["weight"].view(torch.int32), scheme.bits)
    scales, biases = tensors["scales"], tensors["biases"]
    for field, values in (("scale", scales), ("bias", biases)):
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise InputError(f"{name}: {bad} {field} value(s) are NaN or Inf", "file damaged")
    if scheme.symmetric:
        _same(name, biases.float(), scales.float() * -grid_for(scheme).middle)
        return QuantizedLinear(name, scheme, codes, {"scales": scales})
    if not _has_zeros(scheme):
        return QuantizedLinear(name, scheme, codes, {"scales": scales, "mins": biases})
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = torch.where(scales == 0, torch.zeros_like(scales), -biases / safe).round_().clamp_(0, grid_for(scheme).high)
    _same(name, biases, -(scales * zeros))
    halves = scales.half()
    if not torch.equal(halves.float(), scales):
        raise InputError(f"{name}: a scale is no float16 number", "file damaged, or made by another tool")
    return QuantizedLinear(name, scheme, codes, {"scales": halves, "zeros": zeros.to(torch.uint8)})


def _same(name: str, biases: Tensor, expected: Tensor) -> None:
    """Hold the stored biases against those that the grid gives.

    Raises:
        InputError: one differs.
    """
    if not torch.equal(biases, expected):
        row, group = (biases != expected).nonzero()[0].tolist()
        raise InputError(
            f"{name}: the bias of row {row}, group {group} is {float(biases[row, group]):.8g}, "
            f"the scale beside it and the grid give {float(expected[row, group]):.8g}",
            "file damaged, or made by another tool",
        )
