"""Bit packing that no single file format owns."""

from __future__ import annotations

__all__ = ["pack_nibbles", "unpack_nibbles"]

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last axis, the first in the low nibble.

    ``codes`` [..., n] uint8 with values 0…15, n even; returns [..., n/2] uint8.
    """
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`: [..., n/2] uint8 to [..., n] uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).reshape(*packed.shape[:-1], -1)
