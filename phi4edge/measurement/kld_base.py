"""A reference store as llama-perplexity's ``--kl-divergence-base`` file, so that it measures against our reference.

As llama.cpp's ``tools/perplexity/perplexity.cpp`` reads it, little-endian:

    "_logits_"  uint32 n_ctx  int32 n_vocab  int32 n_chunk  int32 tokens[n_chunk · n_ctx]
    and a scored position (n_ctx/2 … n_ctx − 2):
        float32 scale  float32 min_log_prob  uint16 code[n_vocab, rounded up to even]
        with  ln P(v) = scale · code[v] + min_log_prob

llama.cpp chooses scale by position and makes a new rounding error. A store's steps are 32/65535 below the maximum, so
with scale = 16/65535 = STEP/2 and code = 65535 − 2·d every one of them is a step of the file too: it holds the store's
distribution and adds nothing, down to 16 nats below the maximum, where the file ends. What is less likely than e⁻¹⁶
llama-perplexity leaves out of its sum, and a token of the text that lies below the file's end counts as lying there,
which makes PPL(base) too small; :class:`Base` says how much is left out, and what it is exactly.
"""

from __future__ import annotations

__all__ = ["Base", "base_file", "write_base"]

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi4edge.core.atomic import atomic_file, write_json
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_json
from phi4edge.core.memory import format_bytes
from phi4edge.measurement.encoding import STEP, row_blocks
from phi4edge.measurement.reference import ReferenceStore, cache_folder

_MAGIC = b"_logits_"
_CUT = 16.0  # nats: llama-perplexity leaves out what is less likely than e to the minus that


@dataclass(frozen=True)
class Base:
    """A base file, and what llama-perplexity will not tell of the reference in it."""

    path: Path
    left_out_mass: float  # mean probability of the tokens that it leaves out
    ppl: float  # of the reference on the scored positions, from the store's exact log-probabilities


def base_file(store: ReferenceStore, chunks: int, progress: Progress = SILENT) -> Base:
    """The file of the first ``chunks`` chunks in the cache, written where it is not there yet.

    Raises:
        UsageError: the store keeps only the most likely tokens.
        InputError: a damaged store, or no room.
    """
    key = sha256_json({"files": dict(store.header["files"]), "chunks": chunks, "version": 2})[:32]
    path = cache_folder() / "kld-base" / f"{key}.kld"
    note = path.with_suffix(".json")
    if path.is_file() and note.is_file():
        return Base(path, **json.loads(note.read_text(encoding="utf-8")))
    try:
        base = write_base(store, chunks, path, progress)
        write_json(note, {"left_out_mass": base.left_out_mass, "ppl": base.ppl})
    except OSError as error:
        rows = chunks * store.positions
        raise InputError(
            f"{path}: the base file of {format_bytes(rows * _row_bytes(store.vocab_size))} cannot be written "
            f"({error.strerror})",
            "free space, or name another cache with $PHI4EDGE_CACHE; fewer --chunks need less",
        ) from error
    return base


def write_base(store: ReferenceStore, chunks: int, path: Path, progress: Progress = SILENT) -> Base:
    """Write the first ``chunks`` chunks of ``store`` to ``path``, one at a time.

    Raises:
        UsageError: the store keeps only the most likely tokens.
        InputError: a damaged store.
    """
    if store.top is not None:
        raise UsageError(
            f"{store.path}: keeps {store.top} tokens a position, and llama-perplexity needs all of them",
            "measure against a store without --store-top, or with a Python on the device",
        )
    vocab, mass, nll = store.vocab_size, 0.0, 0.0
    row = np.dtype([("scale", "<f4"), ("least", "<f4"), ("codes", "<u2", (vocab + vocab % 2,))])
    assert row.itemsize == _row_bytes(vocab)
    progress.start("base file", chunks, "chunk")
    with atomic_file(path) as file:
        file.write(_MAGIC + struct.pack("<Iii", store.context, vocab, chunks))
        file.write(store.tokens[:chunks].astype("<i4").tobytes())
        for number in range(chunks):
            chunk = store.chunk(number)
            codes = chunk.codes
            nll -= float(chunk.log_prob.astype(np.float64).sum())
            for rows in row_blocks(store.positions, vocab):
                below = codes[rows].astype(np.float64) * STEP
                log_sum = np.log(np.exp(-below).sum(axis=1, keepdims=True))
                log_prob = -below - log_sum
                mass += float(np.exp(log_prob, where=log_prob <= -_CUT, out=np.zeros_like(log_prob)).sum())
                out = np.zeros(len(below), dtype=row)
                out["scale"], out["least"] = STEP / 2, (-_CUT - log_sum)[:, 0]
                out["codes"][:, :vocab] = 65535 - 2 * np.minimum(codes[rows], 32767).astype(np.int32)
                out["codes"][:, :vocab][codes[rows] > 32767] = 0
                file.write(out.data)
            progress.advance()
    progress.finish()
    count = chunks * store.positions
    return Base(path, mass / count, math.exp(nll / count))


def _row_bytes(vocab: int) -> int:
    return 8 + 2 * (vocab + vocab % 2)
