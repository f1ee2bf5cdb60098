"""What stays in the system's memory of a file that is larger than it; Linux says what is there (mincore)."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import sys
import time
from pathlib import Path

import pytest

from phi4edge.checkpoint.digest import digest_file
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core import pagecache
from phi4edge.core.pagecache import Passing, let_go, outgrows_memory, will_need

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is in memory")

PIECE = 1 << 24  # what a digest reads at a time
SIZE = 5 * PIECE


def in_memory(path: Path, offset: int = 0, nbytes: int | None = None) -> int:
    """Bytes of a part of ``path`` that are in the system's memory."""
    nbytes = path.stat().st_size - offset if nbytes is None else nbytes
    page = mmap.PAGESIZE
    assert offset % page == 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
        pages = ctypes.create_string_buffer(-(-len(m) // page))
        start = ctypes.addressof(ctypes.c_char.from_buffer(m))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(m)), pages) == 0
    return page * sum(flag & 1 for flag in pages.raw[offset // page : -(-(offset + nbytes) // page)])


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


def test_of_a_file_that_is_too_large_a_digest_leaves_the_beginning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, int(2.2 * PIECE / 0.4))  # of 5.5 pieces: too few for all, and two may stay
    assert outgrows_memory(SIZE)
    digest = digest_file(file, (), Passing(SIZE))
    assert in_memory(file, 0, 2 * PIECE) == 2 * PIECE
    assert in_memory(file, 3 * PIECE) < PIECE // 4
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_that_fits_stays_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, 2 * SIZE)
    assert not outgrows_memory(SIZE)
    digest_file(file, (), Passing(SIZE))
    assert in_memory(file) == SIZE


def test_where_the_system_says_nothing_of_its_memory_files_stay(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "available_bytes", lambda: None)
    digest_file(file, (), Passing(SIZE))
    assert in_memory(file) == SIZE


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
