"""Bit packing that no single file format owns."""

from __future__ import annotations

__all__ = [
    "as_words",
    "groups_refusal",
    "pack_bytes",
    "pack_nibbles",
    "pack_words",
    "unpack_nibbles",
    "unpack_words",
    "words_refusal",
]

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

assert sys.byteorder == "little", "words are viewed as bytes"


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last axis, the first in the low nibble.

    ``codes`` [..., n] uint8 with values 0…15, n even; returns [..., n/2] uint8.
    """
    flat = codes.contiguous().reshape(-1)  # strides of a lone row may be odd, and so may a view's beginning
    pairs = (flat.clone() if flat.storage_offset() % 2 else flat).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8).reshape(*codes.shape[:-1], -1)  # words of two: vectorised


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`: [..., n/2] uint8 to [..., n] uint8."""
    pairs = packed.contiguous().reshape(-1).to(torch.int16)
    return (pairs | (pairs << 4)).bitwise_and_(0x0F0F).view(torch.uint8).reshape(*packed.shape[:-1], -1)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] uint8 to bytes [..., n·bits/8] uint8 along the last axis, the first in the lowest bits.

    n·bits is a multiple of 8, of 64 with 5 or 6 bits, where a code may lie across two bytes, all one stream.
    """
    if bits == 8:
        return codes
    return pack_nibbles(codes) if bits == 4 else _pack_stream(codes, bits)


def as_words(packed: Tensor) -> Tensor:
    """Bytes [..., m] uint8, m a multiple of 4, as words [..., m/4] int32, the first byte lowest."""
    flat = packed.reshape(-1)  # strides of a lone row may be odd, and so may a view's beginning
    return (flat.clone() if flat.storage_offset() % 4 else flat).view(torch.int32).reshape(*packed.shape[:-1], -1)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] uint8 to words [..., n·bits/32] int32 as :func:`pack_bytes` orders them; n·bits divides by 32."""
    return as_words(pack_bytes(codes, bits))


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_words`: [..., m] int32 to [..., m·32/bits] uint8."""
    packed = words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], -1)
    if bits == 8:
        return packed
    return unpack_nibbles(packed) if bits == 4 else _unpack_stream(packed, bits)


def words_refusal(bits: int, axes: Mapping[str, int]) -> str | None:
    """Why one of ``axes``, name and size, holds no whole number of int32 words of codes, or None."""
    per_word = 32 // bits
    for axis, size in axes.items():
        if size % per_word:
            return f"{axis} {size} is not divisible by {per_word}, the {bits}-bit codes in an int32 word"
    return None


def groups_refusal(group_size: int, in_features: int) -> str | None:
    """Why a row has no whole number of groups, or None; ``group_size`` −1 is the whole row."""
    if group_size > 0 and in_features % group_size:
        return f"in_features {in_features} is not divisible by group_size {group_size}"
    return None


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] uint8, n a multiple of 8, to bytes [..., n·bits/8]: eight codes fill ``bits`` bytes."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8).to(torch.int64)
    number = torch.zeros_like(eights[..., 0])
    for place in range(8):
        number |= eights[..., place] << (place * bits)
    return torch.stack([(number >> (8 * byte)) & 255 for byte in range(bits)], dim=-1).to(torch.uint8).flatten(-2)


def _unpack_stream(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_pack_stream`."""
    groups = packed.reshape(*packed.shape[:-1], -1, bits).to(torch.int64)
    number = torch.zeros_like(groups[..., 0])
    for byte in range(bits):
        number |= groups[..., byte] << (8 * byte)
    mask = 2**bits - 1
    return torch.stack([(number >> (place * bits)) & mask for place in range(8)], dim=-1).to(torch.uint8).flatten(-2)
