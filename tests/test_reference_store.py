"""The reference store: exact enough, never half-finished, never of something else; and the texts it is made on."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, ResumeError, TargetError, UsageError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.measurement import reference as module
from phi4edge.measurement.encoding import STEP
from phi4edge.measurement.reference import ReferenceStore, build_store, default_store, open_store, store_key
from phi4edge.measurement.texts import Chunks, read_chunks, text_sha256
from phi4edge.model.forward import stream_logits

CONTEXT, COUNT = 32, 5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path / "cache"))


def chunks(seed: int = 0, count: int = COUNT, context: int = CONTEXT) -> Chunks:
    tokens = np.random.default_rng(seed).integers(0, 512, (count, context))
    return Chunks("words.txt", sha256_bytes(tokens.tobytes()), 1000, tokens)


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir()) if path.suffix in (".logits", ".bin")}


def test_a_store_holds_the_model_s_logits_of_the_scored_positions(phi4_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, text = open_checkpoint(phi4_checkpoint), chunks()
    store = build_store(checkpoint, text, tmp_path / "store")
    assert (store.first, store.positions, store.vocab_size, store.chunks) == (16, 15, 512, COUNT)
    np.testing.assert_array_equal(store.tokens, text.tokens)
    exact = list(stream_logits(checkpoint, torch.from_numpy(text.tokens), first=16))
    for number, logits in enumerate(exact):
        stored = store.chunk(number)
        decoded = torch.from_numpy(stored.maximum)[:, None] - torch.from_numpy(stored.codes).float() * STEP
        torch.testing.assert_close(decoded, logits[:15].clamp(min=float(logits.max()) - 32), atol=STEP, rtol=0)
        following = torch.from_numpy(text.tokens[number, 17:])
        expected = torch.log_softmax(logits[:15].double(), 1).gather(1, following[:, None]).squeeze(1)
        np.testing.assert_allclose(stored.log_prob, expected, rtol=1e-5)
    assert 0 < store.header["noise_floor_kld"] < 1e-7
    files = sum(path.stat().st_size for path in store.path.glob("*.logits"))
    assert files <= COUNT * 15 * 512 * 4 * 0.52


def test_an_interrupted_store_is_refused_and_then_finished_without_redoing_chunks(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, text = open_checkpoint(phi4_checkpoint), chunks()
    whole = build_store(checkpoint, text, tmp_path / "whole")
    path, written = tmp_path / "store", []

    def stopping(file: Path, chunk: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        real(file, chunk)

    real = module.write_chunk
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_chunk", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_store(checkpoint, text, path)
    with pytest.raises(InputError, match="not finished"):
        open_store(path)
    computed: list[int] = []

    def counting(source: Any, tokens: torch.Tensor, **rest: Any) -> Any:
        computed.append(tokens.shape[0])
        return stream_logits(source, tokens, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "stream_logits", counting)
        build_store(checkpoint, text, path)
    assert computed == [COUNT - 2]
    assert content(path) == content(whole.path)


def test_a_partial_chunk_left_by_a_kill_is_not_taken_for_a_chunk(phi4_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, text = open_checkpoint(phi4_checkpoint), chunks()
    whole = build_store(checkpoint, text, tmp_path / "whole")
    path = tmp_path / "store"
    shutil.copytree(whole.path, path)
    (path / "store.json").unlink()
    first = path / "00001.logits"
    first.with_name(first.name + ".partial").write_bytes(first.read_bytes()[:100])
    first.unlink()
    build_store(checkpoint, text, path)
    assert content(path) == content(whole.path)


def test_a_finished_store_is_used_again_and_the_model_is_not_run(
    phi4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, text = open_checkpoint(phi4_checkpoint), chunks()
    first = build_store(checkpoint, text)
    assert first.path == default_store(store_key(checkpoint, text))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run again")

    monkeypatch.setattr(module, "stream_logits", never)
    assert build_store(checkpoint, text).header == first.header


def test_groups_that_do_not_fit_ram_together_give_the_same_store(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, text = open_checkpoint(phi4_checkpoint), chunks()
    whole = build_store(checkpoint, text, tmp_path / "whole")
    monkeypatch.setattr(module, "sequences_in_ram", lambda *_: 2)
    grouped = build_store(checkpoint, text, tmp_path / "grouped")
    assert content(grouped.path) == content(whole.path)


def test_the_place_of_another_store_is_refused_and_the_difference_named(
    phi4_checkpoint: Path, mini_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    build_store(open_checkpoint(phi4_checkpoint), chunks(), path)
    with pytest.raises(ResumeError, match="fingerprint"):
        build_store(open_checkpoint(mini_checkpoint), chunks(), path)
    with pytest.raises(ResumeError, match="text_sha256"):
        build_store(open_checkpoint(phi4_checkpoint), chunks(seed=1), path)
    with pytest.raises(ResumeError, match="chunks was 5, is now 4"):
        build_store(open_checkpoint(phi4_checkpoint), chunks(count=4), path)
    (path / "store.json").unlink()  # as if it had not been finished
    with pytest.raises(ResumeError, match="text_sha256"):
        build_store(open_checkpoint(phi4_checkpoint), chunks(seed=1), path)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="not empty"):
        build_store(open_checkpoint(phi4_checkpoint), chunks(), other)


def test_a_full_disk_is_a_sentence_and_finished_chunks_stay(
    phi4_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, text, path = open_checkpoint(phi4_checkpoint), chunks(), tmp_path / "store"
    real = module.write_chunk

    def full(file: Path, chunk: Any) -> None:
        if file.name == "00003.logits":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, chunk)

    monkeypatch.setattr(module, "write_chunk", full)
    with pytest.raises(TargetError, match="No space left"):
        build_store(checkpoint, text, path)
    assert [file.name for file in sorted(path.glob("*.logits"))] == ["00000.logits", "00001.logits", "00002.logits"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(TargetError, match=r"needs .* KiB, but 1000 B are free"):
        build_store(checkpoint, text, path)


def test_changed_weights_are_noticed(phi4_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(phi4_checkpoint, copy)
    before = store_key(open_checkpoint(copy), chunks())
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    assert store_key(open_checkpoint(copy), chunks())["fingerprint"] != before["fingerprint"]


def flip(store: ReferenceStore, name: str) -> None:
    data = bytearray((store.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store.path / name).write_bytes(data)


def test_a_flipped_bit_is_found(phi4_checkpoint: Path, tmp_path: Path) -> None:
    store = build_store(open_checkpoint(phi4_checkpoint), chunks(), tmp_path / "store")
    flip(store, "00003.logits")
    store.chunk(2)
    with pytest.raises(InputError, match=r"00003\.logits: differs"):
        store.chunk(3)
    flip(store, "tokens.bin")
    with pytest.raises(InputError, match=r"tokens\.bin: differs"):
        _ = open_store(store.path).tokens


def test_a_store_in_an_unknown_encoding_is_refused(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = build_store(open_checkpoint(phi4_checkpoint), chunks(), tmp_path / "store").path
    header = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps(header | {"encoding": "top-k"}))
    with pytest.raises(InputError, match="top-k"):
        open_store(path)
    (path / "store.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        open_store(path)


class Letters:
    """A tokenizer whose tokens are characters."""

    def __init__(self, bos_id: int | None = None) -> None:
        self.bos_id = bos_id
        self.add_bos = bos_id is not None

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def test_chunks_are_cut_as_llama_perplexity_cuts_them(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    plain = read_chunks(str(path), Letters(), context=8)
    assert ["".join(map(chr, row)) for row in plain.tokens] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    marked = read_chunks(str(path), Letters(bos_id=1), context=8)
    assert ["".join(map(chr, row)) for row in marked.tokens] == ["\1abcdefg", "\1ijklmno", "\1qrstuvw"]
    assert plain.sha256 == text_sha256(str(path), plain.characters)
    assert plain.name == "letters.txt"


def test_a_text_that_is_too_short_or_empty_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abcdefghij")
    with pytest.raises(InputError, match=r"10 tokens, but 2 chunk.* of 8 need 16") as caught:
        read_chunks(str(path), Letters(), context=8, chunks=2)
    assert caught.value.hint == "give --chunks 1 or a longer text"
    with pytest.raises(InputError, match=r"10 tokens, but 1 chunk.* of 512 need 512"):
        read_chunks(str(path), Letters())
    path.write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        read_chunks(str(path), Letters(), context=8)
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 3"):
        read_chunks(str(path), Letters(), context=8)
    with pytest.raises(InputError, match="no such file"):
        read_chunks(str(tmp_path / "none.txt"), Letters(), context=8)
    with pytest.raises(UsageError):
        read_chunks(str(path), Letters(), context=4)
    with pytest.raises(UsageError):
        read_chunks(str(path), Letters(), chunks=0)


def test_documents_of_a_corpus_are_read_only_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " + "x" * 90}) + "\n" for i in range(1000)))
    cut = read_chunks(str(path), Letters(), context=64, chunks=4)
    assert cut.tokens.shape == (4, 64)
    assert cut.characters == 4 * 64 * 8
    assert text_sha256(str(path), cut.characters) == cut.sha256
    every_second = type("Sparse", (Letters,), {"encode": lambda _, text: [ord(c) for c in text[::32]]})()
    longer = read_chunks(str(path), every_second, context=64, chunks=4)
    assert longer.tokens.shape == (4, 64)
    assert text_sha256(str(path), longer.characters) == longer.sha256
