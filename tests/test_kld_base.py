"""The reference store as llama-perplexity's base file: its own reading gives the store's distribution."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import UsageError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.measurement.encoding import STEP, StoredChunk
from phi4edge.measurement.kld_base import base_file, write_base
from phi4edge.measurement.reference import ReferenceStore, build_store
from phi4edge.measurement.texts import Chunks

CONTEXT, COUNT, VOCAB = 33, 3, 512
POSITIONS = CONTEXT - 1 - CONTEXT // 2


@pytest.fixture(scope="module")
def stores(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReferenceStore]:
    ids = np.random.default_rng(0).integers(0, VOCAB, (COUNT, CONTEXT))
    text, folder = Chunks("ids", sha256_bytes(ids.tobytes()), 1, ids), tmp_path_factory.mktemp("stores")
    checkpoint = open_checkpoint(phi4_checkpoint)
    whole = build_store(checkpoint, text, folder / "whole")
    return {"whole": whole, "top": build_store(checkpoint, text, folder / "top", top=20)}


def read_as_llama_perplexity(path: Path) -> tuple[int, int, int, np.ndarray, np.ndarray]:
    """perplexity.cpp's kl_divergence(), in NumPy: the header, the tokens and ln P of every scored position."""
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    context, vocab, chunks = struct.unpack_from("<Iii", data, 8)
    tokens = np.frombuffer(data, "<i4", context * chunks, 20)
    nv = 2 * ((vocab + 1) // 2) + 4
    rows = np.frombuffer(data, "<u2", offset=20 + 4 * len(tokens)).reshape(chunks * (context - 1 - context // 2), nv)
    scale, least = (np.ascontiguousarray(rows[:, :4]).view("<f4")[:, i : i + 1] for i in (0, 1))
    return context, vocab, chunks, tokens, scale * rows[:, 4 : 4 + vocab].astype(np.float32) + least


def test_llama_perplexity_reads_the_store_s_distribution(stores: dict[str, ReferenceStore], tmp_path: Path) -> None:
    store, path = stores["whole"], tmp_path / "base.kld"
    base = write_base(store, 2, path)
    context, vocab, chunks, tokens, log_p = read_as_llama_perplexity(path)
    assert (context, vocab, chunks) == (CONTEXT, VOCAB, 2)
    assert np.array_equal(tokens.reshape(2, CONTEXT), store.tokens[:2])
    codes = np.concatenate([store.chunk(number).codes for number in range(2)]).astype(np.float64)
    exact = torch.log_softmax(torch.from_numpy(-codes * STEP), dim=1).numpy()
    held = exact > -16
    assert np.abs(log_p - exact)[held].max() < 4e-6, "a step of the store is a step of the file"
    assert (log_p[codes > 32767] <= -16).all(), "what lies below the file's range is left out, not made likelier"
    assert base.left_out_mass == pytest.approx(np.exp(exact)[~held].sum() / len(exact), rel=1e-6, abs=1e-15)


def test_the_reference_s_own_perplexity_is_exact(stores: dict[str, ReferenceStore], tmp_path: Path) -> None:
    log_prob = np.concatenate([stores["whole"].chunk(number).log_prob for number in range(2)]).astype(np.float64)
    assert write_base(stores["whole"], 2, tmp_path / "base.kld").ppl == pytest.approx(np.exp(-log_prob.mean()))


def test_a_position_with_one_certain_token_leaves_the_others_out(
    stores: dict[str, ReferenceStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.full((POSITIONS, VOCAB), 65535, dtype="<u2")
    codes[:, 7], codes[:, 8] = 0, 32768  # the second lies one step below the range
    nothing = np.zeros(POSITIONS, dtype="<f4")
    chunk = StoredChunk(nothing.astype("<i4"), nothing, nothing, nothing, codes)
    monkeypatch.setattr(ReferenceStore, "chunk", lambda self, number: chunk)
    write_base(stores["whole"], 1, tmp_path / "base.kld")
    log_p = read_as_llama_perplexity(tmp_path / "base.kld")[-1]
    assert np.abs(log_p[:, 7]).max() < 1e-6
    assert (log_p[:, np.arange(VOCAB) != 7] <= -16).all()


def test_an_odd_vocabulary_is_padded(
    stores: dict[str, ReferenceStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores["whole"]
    kept = {number: store.chunk(number) for number in range(COUNT)}
    odd = {n: StoredChunk(c.top, c.log_prob, c.maximum, c.noise, c.codes[:, :-1]) for n, c in kept.items()}
    monkeypatch.setattr(ReferenceStore, "vocab_size", property(lambda self: VOCAB - 1))
    monkeypatch.setattr(ReferenceStore, "chunk", lambda self, number: odd[number])
    write_base(store, COUNT, tmp_path / "odd.kld")
    log_p = read_as_llama_perplexity(tmp_path / "odd.kld")[-1]
    assert log_p.shape == (COUNT * POSITIONS, VOCAB - 1)
    assert np.exp(log_p.astype(np.float64)).sum(axis=1) == pytest.approx(1, abs=1e-4)


def test_the_file_is_made_once_and_not_of_a_store_that_lacks_tokens(
    stores: dict[str, ReferenceStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path))
    base = base_file(stores["whole"], 2)
    before = base.path.stat()
    assert base_file(stores["whole"], 2) == base
    assert base.path.stat().st_mtime_ns == before.st_mtime_ns
    assert base_file(stores["whole"], 1).path != base.path
    with pytest.raises(UsageError, match="keeps 20 tokens"):
        base_file(stores["top"], 2)
