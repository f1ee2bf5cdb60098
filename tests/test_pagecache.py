"""What stays in the system's memory of a file that is larger than it; Linux says what is there (mincore)."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_support import in_memory

from phi4edge.checkpoint import reader as reader_module
from phi4edge.checkpoint.digest import digest_file
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core import pagecache
from phi4edge.core.pagecache import let_go, outgrows_memory, will_need

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is in memory")

PIECE = 1 << 24  # what a digest reads at a time
SIZE = 5 * PIECE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of five pieces, on the disk."""
    path = tmp_path / "file"
    with path.open("wb") as out:
        for i in range(SIZE // PIECE):
            out.write(bytes([i]) * PIECE)
        out.flush()
        os.fsync(out.fileno())
        let_go(out.fileno(), 0, SIZE)
    if in_memory(path):
        pytest.skip("this file system keeps its files in memory")
    return path


def small_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(pagecache, "available_bytes", lambda: nbytes)


def test_what_was_let_go_is_gone_and_comes_back(file: Path) -> None:
    file.read_bytes()
    assert in_memory(file) == SIZE
    with file.open("rb") as opened:
        let_go(opened.fileno(), PIECE, PIECE)
        assert in_memory(file, 0, PIECE) == PIECE
        assert in_memory(file, PIECE, PIECE) < PIECE // 4
        will_need(opened.fileno(), PIECE, PIECE)
    until = time.monotonic() + 10
    while in_memory(file, PIECE, PIECE) < PIECE // 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert in_memory(file, PIECE, PIECE) >= PIECE // 2


def test_a_digest_takes_a_file_into_memory_or_goes_around_it(file: Path) -> None:
    around = digest_file(file, around_cache=True)
    assert in_memory(file) < PIECE // 4
    assert digest_file(file) == around == hashlib.sha256(file.read_bytes()).hexdigest()
    assert in_memory(file) == SIZE


@pytest.mark.parametrize(("available", "outgrown"), [(2 * SIZE, False), (SIZE, True), (None, False)])
def test_a_checkpoint_outgrows_what_memory_is_available(
    monkeypatch: pytest.MonkeyPatch, available: int | None, outgrown: bool
) -> None:
    monkeypatch.setattr(pagecache, "available_bytes", lambda: available)
    assert outgrows_memory(SIZE) is outgrown


@pytest.mark.parametrize("fits", [True, False])
def test_a_reader_goes_around_the_cache_for_rows_only_where_the_checkpoint_is_too_large(
    phi4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """A whole weight was asked for ahead: from the disk again, it would be read twice."""
    small_memory(monkeypatch, (1 << 40) if fits else 1)
    around: list[bool] = []
    read = reader_module.read_range

    def noted(*arguments: Any, around_cache: bool, **named: Any) -> Any:
        around.append(around_cache)
        return read(*arguments, around_cache=around_cache, **named)

    monkeypatch.setattr(reader_module, "read_range", noted)
    reader = open_checkpoint(phi4_checkpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(reader.tensor(name)[3:9], reader.tensor(name, slice(3, 9)))
    assert around == [False, not fits]


@pytest.mark.parametrize("fits", [True, False])
def test_a_reader_lets_go_of_tensors_only_where_the_checkpoint_is_too_large(
    phi4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    small_memory(monkeypatch, (1 << 40) if fits else 1)
    gone: list[tuple[int, int]] = []
    monkeypatch.setattr("phi4edge.checkpoint.reader.let_go", lambda _, offset, nbytes: gone.append((offset, nbytes)))
    reader = open_checkpoint(phi4_checkpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    reader.done_with(name)
    reader.done_with("no.such.tensor")
    ref = reader.index.tensors[name]
    assert gone == ([] if fits else [(ref.offset, ref.nbytes)])
