"""Rotary position embedding of the family: plain or longrope, over all of a head's channels or a part.

For channel pair i of the ``dim`` rotated channels: angle = position / (factorᵢ · θ^(2i/dim)), factor 1 for
plain rope. Longrope has two sets of factors and takes the long one for a sequence that exceeds the original
context; cos and sin carry its attention factor. Source: "LongRoPE", arXiv 2402.13753, as transformers'
Phi3RotaryEmbedding computes it.
"""

from __future__ import annotations

__all__ = ["Rotary", "apply_rotary", "rotary_table"]

from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.checkpoint.config import RopeConfig


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position, both [length, dim] float32."""

    cos: Tensor
    sin: Tensor


def rotary_table(rope: RopeConfig, length: int, device: torch.device | str = "cpu") -> Rotary:
    """The table for one sequence of ``length`` tokens from position 0."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    inverse = rope.theta**exponents
    factors = rope.short_factor
    if factors is not None and rope.original_context is not None and length > rope.original_context:
        factors = rope.long_factor
    if factors is not None:
        inverse = torch.tensor(factors, dtype=torch.float32) * inverse
    angles = torch.arange(length, dtype=torch.float32)[:, None] * (1.0 / inverse)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    table = Rotary(angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor)
    return Rotary(table.cos.to(device), table.sin.to(device))


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first ``dim`` channels of ``x`` [batch, heads, length, head_dim]; the rest pass through."""
    dim = rotary.cos.shape[-1]
    turned, passed = x[..., :dim], x[..., dim:]
    first, second = turned[..., : dim // 2], turned[..., dim // 2 :]
    rotated = turned * rotary.cos + torch.cat((-second, first), dim=-1) * rotary.sin
    return torch.cat((rotated, passed), dim=-1) if passed.shape[-1] else rotated
