"""How a reference's logits are stored: 16-bit fixed point below the maximum, and exact values where it matters.

A logit x is kept as d = max − x, rounded to steps of 32/65535 nat; what lies more than 32 nats below the maximum
(probability below 1.3e-14 times the most likely token's) is kept as 32. With rounding errors ε the stored
distribution P̂ differs from the exact P by

    KLD(P ‖ P̂) = ½ Var_P(ε) + O(ε³) ≤ ½ · step²/12 ≈ 1e-8 on average

for any model, because the step is the same everywhere; half precision of d has its step grow with d and is 60 times
as noisy on typical logits, and llama-perplexity's own file has a floor of 5.5e-4. The most likely token, the
log-probability of the text's next token and the maximum itself are kept exactly.

For large vocabularies only the ``top`` most likely tokens may be kept, and of all others the sum of their
probabilities, exactly. Which tokens they are takes a bit for every token of the vocabulary, or 4 bytes for each that
is kept, whichever is less. What is then measured is the divergence after those others were made one,

    Σ_top P ln(P/Q) + P_tail ln(P_tail/Q_tail)  =  KLD(P ‖ Q) − P_tail · KLD(P_tail ‖ Q_tail)

with P_tail, Q_tail also for the two distributions within the tail: a lower bound. On the demo's stand-in, 4 bits on
English text, it falls short by 2.3 times the tail's mass. The mass is measured and stated; the noise floor is the same.
"""

from __future__ import annotations

__all__ = [
    "STEP",
    "StoredChunk",
    "chunk_bytes",
    "encode",
    "encoding_name",
    "is_encoding",
    "read_chunk_file",
    "row_blocks",
    "top_of",
    "write_chunk",
]

import re
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
BLOCK_BYTES = 2**19  # float32 logits worked on at a time, so that they and what is made of them stay in a core's cache

_NAME = re.compile(rf"{ENCODING}(?:-top([1-9]\d*))?")

# The file of a chunk: these arrays one after another, little-endian, each [positions] but the last;
# with ``top``, the tail's sums after them, and the tokens before the codes.
_FIELDS = (("top", "<i4"), ("log_prob", "<f4"), ("maximum", "<f4"), ("noise", "<f4"))


@dataclass(frozen=True)
class StoredChunk:
    """Reference logits of one chunk's scored positions."""

    top: NDArray[np.int32]  # [positions] most likely token
    log_prob: NDArray[np.float32]  # [positions] ln p of the token that follows in the text
    maximum: NDArray[np.float32]  # [positions] the largest logit
    noise: NDArray[np.float32]  # [positions] KLD of what is stored against what was encoded
    codes: NDArray[np.uint16]  # [positions, vocab], or [positions, top]: (maximum − logit) / STEP
    tokens: NDArray[np.int32] | None = None  # [positions, top] which tokens the codes are of, ascending; None: all
    tail: NDArray[np.float32] | None = None  # [positions] ln Σ of exp(logit − maximum) over the tokens left out

    vocab: int | None = None  # tokens of the vocabulary, where not all are kept

    @property
    def tail_mass(self) -> NDArray[np.float64]:
        """[positions] probability of all tokens that were left out."""
        if self.tail is None:
            return np.zeros(len(self.top))
        kept = np.exp(-self.codes.astype(np.float64) * STEP).sum(axis=1)
        rest = np.exp(self.tail.astype(np.float64))
        mass: NDArray[np.float64] = rest / (kept + rest)
        return mass


def encoding_name(top: int | None) -> str:
    """The name of the encoding that keeps ``top`` tokens a position, None: all."""
    return ENCODING if top is None else f"{ENCODING}-top{top}"


def is_encoding(name: str) -> bool:
    """Whether ``name`` is that of an encoding that is known here."""
    return _NAME.fullmatch(name) is not None


def top_of(name: str) -> int | None:
    """How many tokens the encoding of that name keeps a position, None: all."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]) if match[1] else None


def row_blocks(positions: int, vocab: int) -> Iterator[slice]:
    """Slices of rows that are worked on together."""
    rows = max(1, BLOCK_BYTES // (vocab * 4))
    return (slice(start, min(start + rows, positions)) for start in range(0, positions, rows))


@torch.inference_mode()
def encode(logits: Tensor, following: Tensor, keep: int | None = None) -> StoredChunk:
    """Encode ``logits`` [positions, vocab] float32; ``following`` [positions] int64 are the next tokens.

    ``keep``: so many of the most likely tokens and the sum of the others, None: all.

    Raises:
        InputError: a logit that is not finite.
    """
    positions, vocab = logits.shape
    kept = vocab if keep is None else min(keep, vocab - 1)
    codes = np.empty((positions, kept), dtype="<u2")
    tokens, tail = np.empty((positions, kept if keep else 0), dtype="<i4"), torch.empty(positions)
    log_prob, noise = torch.empty(positions), torch.empty(positions)
    top = torch.empty(positions, dtype=torch.int64)
    maximum = torch.empty(positions)
    for rows in row_blocks(positions, vocab):
        x = logits[rows]
        maximum[rows], top[rows] = x.max(dim=1)
        if not bool(torch.isfinite(maximum[rows]).all()) or not bool(torch.isfinite(x.amin())):
            raise InputError("the reference model gives logits that are NaN or infinite", "its weights are damaged")
        below = maximum[rows, None] - x
        weight = torch.exp(-below)
        total = weight.sum(dim=1)
        chosen = below.gather(1, following[rows, None]).squeeze(1)
        log_prob[rows] = (-chosen.double() - total.double().log()).float()
        if keep is not None:
            places = below.topk(kept, dim=1, largest=False).indices.sort(dim=1).values
            below, weight = below.gather(1, places), weight.gather(1, places)
            tokens[rows] = places.numpy()
            rest = (maximum[rows, None] - x).scatter_(1, places, torch.inf)
            tail[rows] = torch.logsumexp(-rest, dim=1)
            total = weight.sum(dim=1) + tail[rows].exp()  # the tail has no rounding error
        code = (below * (1 / STEP)).round_().clamp_(0, 65535)
        codes[rows] = code.numpy()
        error = code.mul_(STEP).sub_(below)
        mean = torch.linalg.vecdot(weight, error) / total
        square = torch.linalg.vecdot(weight, error.square_()) / total
        noise[rows] = 0.5 * (square - mean.square()).clamp_(min=0)
    plain = (top.numpy().astype("<i4"), log_prob.numpy(), maximum.numpy(), noise.numpy(), codes)
    return StoredChunk(*plain) if keep is None else StoredChunk(*plain, tokens, tail.numpy(), vocab)


def _fields(keep: int | None) -> tuple[tuple[str, str], ...]:
    return _FIELDS if keep is None else (*_FIELDS, ("tail", "<f4"))


def chunk_bytes(positions: int, vocab: int, keep: int | None = None) -> int:
    """Size of a chunk's file."""
    kept = vocab if keep is None else min(keep, vocab - 1)
    named = 0 if keep is None else -(-vocab // 8) if _in_bits(kept, vocab) else 4 * kept
    return positions * (4 * len(_fields(keep)) + named + 2 * kept)


def _in_bits(kept: int, vocab: int) -> bool:
    """Whether a bit for every token takes less than 4 bytes for each that is kept."""
    return vocab < 32 * kept


def write_chunk(path: Path, chunk: StoredChunk) -> None:
    """Write one chunk atomically."""
    fields = _fields(None if chunk.tokens is None else chunk.tokens.shape[1])
    with atomic_file(path) as file:
        for name, dtype in fields:
            file.write(np.ascontiguousarray(getattr(chunk, name), dtype=dtype).data)
        if chunk.tokens is not None and chunk.vocab is not None:
            file.write(_named(chunk.tokens, chunk.vocab).data)
        file.write(np.ascontiguousarray(chunk.codes, dtype="<u2").data)


def _named(tokens: NDArray[np.int32], vocab: int) -> NDArray[Any]:
    """Which ``tokens`` [positions, kept] are kept, as they are written."""
    if not _in_bits(tokens.shape[1], vocab):
        return np.ascontiguousarray(tokens, dtype="<i4")
    bits = np.zeros((len(tokens), vocab), dtype=np.uint8)
    np.put_along_axis(bits, tokens.astype(np.int64), 1, axis=1)
    return np.packbits(bits, axis=1)


def read_chunk_file(data: NDArray[np.uint8], positions: int, vocab: int, keep: int | None = None) -> StoredChunk:
    """The chunk in ``data``, the bytes of its file."""
    arrays: dict[str, NDArray[Any]] = {}
    offset, kept = 0, vocab if keep is None else min(keep, vocab - 1)
    for name, dtype in _fields(keep):
        arrays[name] = data[offset : offset + 4 * positions].view(dtype)
        offset += 4 * positions
    if keep is not None:
        size = -(-vocab // 8) if _in_bits(kept, vocab) else 4 * kept
        named = data[offset : offset + positions * size]
        offset += positions * size
        if _in_bits(kept, vocab):
            bits = np.unpackbits(named.reshape(positions, size), axis=1, count=vocab)
            arrays["tokens"] = bits.nonzero()[1].astype("<i4").reshape(positions, kept)
        else:
            arrays["tokens"] = named.view("<i4").reshape(positions, kept)
    codes = data[offset:].view("<u2").reshape(positions, kept)
    return StoredChunk(**arrays, codes=codes, vocab=None if keep is None else vocab)
