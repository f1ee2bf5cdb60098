"""Bit packing that no single file format owns."""

from __future__ import annotations

__all__ = ["pack_nibbles", "unpack_nibbles"]

import sys

import torch
from torch import Tensor

assert sys.byteorder == "little", "two codes are viewed as a word"


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
