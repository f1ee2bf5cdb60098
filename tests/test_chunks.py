"""Ready token chunks as a corpus: taken as they are, and refused where they cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phi4edge.calibration.corpus import load_corpus
from phi4edge.core.errors import InputError
from phi4edge.model.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(phi4_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(phi4_checkpoint)


def saved(path: Path, tokens: torch.Tensor, name: str = "tokens", domains: str | None = None) -> str:
    save_file({name: tokens}, path, None if domains is None else {"domains": domains})
    return str(path)


def test_ready_chunks_are_taken_as_they_are_and_in_their_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = load_corpus("builtin", tokenizer, samples=6, sequence_length=32)
    path = saved(tmp_path / "chunks.safetensors", text.tokens)
    ready = load_corpus(path, tokenizer, samples=6, sequence_length=32, seed=7)
    assert torch.equal(ready.tokens, text.tokens)
    assert ready.sha256 == text.sha256  # a run with the same tokens has the same key
    assert torch.equal(load_corpus(path, tokenizer, samples=2, sequence_length=32).tokens, text.tokens[:2])


def test_every_named_domain_has_its_share_of_what_is_kept_aside(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = torch.arange(8 * 4).reshape(8, 4)
    path = saved(tmp_path / "chunks.safetensors", tokens, domains=json.dumps(["a", "b"] * 4))
    corpus = load_corpus(path, tokenizer, samples=8, sequence_length=4, held_out=2)
    assert corpus.domain_counts() == {d: {"samples": 4, "held_out": 1} for d in "ab"}
    assert torch.equal(corpus.tokens[-2:], tokens[-2:])
    plain = load_corpus(saved(tmp_path / "plain.safetensors", tokens), tokenizer, samples=8, sequence_length=4)
    assert set(plain.domains) == {"plain"}
    for wrong in ('["a"]', '{"a": 8}', "a, b"):
        with pytest.raises(InputError, match="domains is not"):
            load_corpus(
                saved(tmp_path / "c.safetensors", tokens, domains=wrong), tokenizer, samples=8, sequence_length=4
            )


def test_a_mix_takes_its_share_of_ready_chunks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ready = load_corpus("builtin", tokenizer, samples=4, sequence_length=32, seed=3)
    path = saved(tmp_path / "chunks.safetensors", ready.tokens, domains=json.dumps(["a", "b"] * 2))
    (tmp_path / "notes.txt").write_text("What a model is given to read, it is judged by. " * 99)
    mix = load_corpus(f"{path}=0.25,{tmp_path}/notes.txt=0.75", tokenizer, samples=8, sequence_length=32)
    assert mix.domain_counts() == {d: {"samples": n, "held_out": 0} for d, n in (("a", 1), ("b", 1), ("notes", 6))}
    taken = {tuple(row) for row, domain in zip(mix.tokens.tolist(), mix.domains, strict=True) if domain in "ab"}
    assert taken == {tuple(row) for row in ready.tokens[:2].tolist()}
    # Where there are fewer chunks than their share, the rest of the mix makes up for them.
    more = load_corpus(f"{path}=0.75,{tmp_path}/notes.txt=0.25", tokenizer, samples=8, sequence_length=32)
    assert more.domain_counts()["notes"]["samples"] == 4
    with pytest.raises(InputError, match="has chunks of 32 tokens, the sequence length is 31"):
        load_corpus(f"{path}=0.5,{tmp_path}/notes.txt=0.5", tokenizer, samples=8, sequence_length=31)


@pytest.mark.parametrize(
    ("tokens", "name", "message"),
    [
        (torch.zeros(4, 31, dtype=torch.int64), "tokens", "has chunks of 31 tokens, the sequence length is 32"),
        (torch.zeros(3, 32, dtype=torch.int64), "tokens", "has 3 chunks, 4 samples are asked for"),
        (torch.zeros(4, 32, dtype=torch.int32), "tokens", r"tokens is int32 \[4, 32\]"),
        (torch.zeros(4, 32, dtype=torch.int64), "input_ids", "no tensor 'tokens', only input_ids"),
        (torch.full((4, 32), 10**6), "tokens", "holds token id 1000000, the vocabulary has"),
        (torch.full((4, 32), -1), "tokens", "holds token id -1"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, tokens: torch.Tensor, name: str, message: str
) -> None:
    path = saved(tmp_path / "chunks.safetensors", tokens, name)
    with pytest.raises(InputError, match=message):
        load_corpus(path, tokenizer, samples=4, sequence_length=32)


def test_a_file_that_is_not_there_or_damaged_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_corpus(str(tmp_path / "none.safetensors"), tokenizer, samples=4, sequence_length=32)
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_corpus(str(tmp_path / "bad.safetensors"), tokenizer, samples=4, sequence_length=32)
