"""How a reference's logits are stored: 16-bit fixed point below the maximum, and exact values where it matters.

A logit x is kept as d = max − x, rounded to steps of 32/65535 nat; what lies more than 32 nats below the maximum
(probability below 1.3e-14 times the most likely token's) is kept as 32. With rounding errors ε the stored
distribution P̂ differs from the exact P by

    KLD(P ‖ P̂) = ½ Var_P(ε) + O(ε³) ≤ ½ · step²/12 ≈ 1e-8 on average

for any model, because the step is the same everywhere; half precision of d has its step grow with d and is 60 times
as noisy on typical logits, and llama-perplexity's own file has a floor of 5.5e-4. The most likely token, the
log-probability of the text's next token and the maximum itself are kept exactly.
"""

from __future__ import annotations

__all__ = ["ENCODING", "STEP", "StoredChunk", "chunk_bytes", "encode", "read_chunk_file", "row_blocks", "write_chunk"]

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi4edge.core.atomic import atomic_file
from phi4edge.core.errors import InputError

ENCODING = "u16-fixed-32"
RANGE = 32.0  # nats below the maximum
STEP = RANGE / 65535
BLOCK_BYTES = 2 * 2**20  # float32 logits worked on at a time, so that they stay in the cache

# The file of a chunk: these arrays one after another, little-endian, each [positions] but the last.
_FIELDS = (("top", "<i4"), ("log_prob", "<f4"), ("maximum", "<f4"), ("noise", "<f4"))


@dataclass(frozen=True)
class StoredChunk:
    """Reference logits of one chunk's scored positions."""

    top: NDArray[np.int32]  # [positions] most likely token
    log_prob: NDArray[np.float32]  # [positions] ln p of the token that follows in the text
    maximum: NDArray[np.float32]  # [positions] the largest logit
    noise: NDArray[np.float32]  # [positions] KLD of what is stored against what was encoded
    codes: NDArray[np.uint16]  # [positions, vocab] (maximum − logit) / STEP


def row_blocks(positions: int, vocab: int) -> Iterator[slice]:
    """Slices of rows that are worked on together."""
    rows = max(1, BLOCK_BYTES // (vocab * 4))
    return (slice(start, min(start + rows, positions)) for start in range(0, positions, rows))


@torch.inference_mode()
def encode(logits: Tensor, following: Tensor) -> StoredChunk:
    """Encode ``logits`` [positions, vocab] float32; ``following`` [positions] int64 are the next tokens.

    Raises:
        InputError: a logit that is not finite.
    """
    positions, vocab = logits.shape
    codes = np.empty((positions, vocab), dtype="<u2")
    log_prob, noise = torch.empty(positions), torch.empty(positions)
    top = torch.empty(positions, dtype=torch.int64)
    maximum = torch.empty(positions)
    for rows in row_blocks(positions, vocab):
        x = logits[rows]
        maximum[rows], top[rows] = x.max(dim=1)
        if not bool(torch.isfinite(maximum[rows]).all()) or not bool(torch.isfinite(x.amin())):
            raise InputError("the reference model gives logits that are NaN or infinite", "its weights are damaged")
        below = maximum[rows, None] - x
        code = (below * (1 / STEP)).round_().clamp_(0, 65535)
        codes[rows] = code.numpy()
        weight = torch.exp(-below)
        total = weight.sum(dim=1)
        error = code.mul_(STEP).sub_(below)
        mean = torch.linalg.vecdot(weight, error) / total
        square = torch.linalg.vecdot(weight, error.square_()) / total
        noise[rows] = 0.5 * (square - mean.square()).clamp_(min=0)
        chosen = below.gather(1, following[rows, None]).squeeze(1)
        log_prob[rows] = (-chosen.double() - total.double().log()).float()
    return StoredChunk(top.numpy().astype("<i4"), log_prob.numpy(), maximum.numpy(), noise.numpy(), codes)


def chunk_bytes(positions: int, vocab: int) -> int:
    """Size of a chunk's file."""
    return positions * (4 * len(_FIELDS) + 2 * vocab)


def write_chunk(path: Path, chunk: StoredChunk) -> None:
    """Write one chunk atomically."""
    with atomic_file(path) as file:
        for name, dtype in _FIELDS:
            file.write(np.ascontiguousarray(getattr(chunk, name), dtype=dtype).data)
        file.write(np.ascontiguousarray(chunk.codes, dtype="<u2").data)


def read_chunk_file(data: NDArray[np.uint8], positions: int, vocab: int) -> StoredChunk:
    """The chunk in ``data``, the bytes of its file."""
    arrays: dict[str, NDArray[Any]] = {}
    offset = 0
    for name, dtype in _FIELDS:
        arrays[name] = data[offset : offset + 4 * positions].view(dtype)
        offset += 4 * positions
    return StoredChunk(**arrays, codes=data[offset:].view("<u2").reshape(positions, vocab))
