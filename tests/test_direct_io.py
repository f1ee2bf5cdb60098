"""Files read and written around the page cache: the same bytes as through it, wherever they lie."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_support import in_memory

from phi4edge.core import direct_io
from phi4edge.core.direct_io import aligned_buffer, read_range
from phi4edge.core.hashing import HashedFile

SECTOR = 1 << 12
BUFFER = 1 << 22  # what a writer sends at a time
LARGE = 9 * BUFFER + 12345  # its middle goes around the cache


def drawn(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


def direct_is_possible(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (AttributeError, OSError):
        return False
    return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file whose length is no whole sector, on the disk and not in the cache."""
    path = tmp_path / "file"
    path.write_bytes(drawn(9 * SECTOR + 77))
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


RANGES = [(0, 10), (0, SECTOR), (5, SECTOR), (SECTOR - 1, 2), (3 * SECTOR, 2 * SECTOR), (SECTOR + 9, 7 * SECTOR + 1)]


@pytest.mark.parametrize("around_cache", [True, False])
@pytest.mark.parametrize(("offset", "nbytes"), [*RANGES, (8 * SECTOR, SECTOR + 77), (9 * SECTOR + 70, 7), (17, 0)])
def test_a_range_is_what_lies_there(file: Path, offset: int, nbytes: int, around_cache: bool) -> None:
    expected = file.read_bytes()[offset : offset + nbytes]
    assert bytes(read_range(file, offset, nbytes, around_cache=around_cache)) == expected
    room = aligned_buffer(nbytes)
    found = read_range(file, offset, nbytes, around_cache=around_cache, into=room)
    assert bytes(found) == expected
    assert np.shares_memory(found, room) or not nbytes


@pytest.mark.parametrize("around_cache", [True, False])
@pytest.mark.parametrize(("offset", "left"), [(9 * SECTOR, 77), (8 * SECTOR + 1, SECTOR + 76), (9 * SECTOR + 77, 0)])
def test_a_file_that_ends_early_gives_what_it_has(file: Path, offset: int, left: int, around_cache: bool) -> None:
    assert len(read_range(file, offset, 3 * SECTOR, around_cache=around_cache)) == left
    assert len(read_range(file, 30 * SECTOR, SECTOR, around_cache=around_cache)) == 0


def test_what_is_read_around_the_cache_does_not_come_into_it_and_is_not_older_than_it(file: Path) -> None:
    if in_memory(file) or not direct_is_possible(file):
        pytest.skip("this file system keeps its files in memory")
    data = read_range(file, 5, 6 * SECTOR, around_cache=True)
    assert in_memory(file) == 0
    whole = file.read_bytes()
    assert bytes(data) == whole[5 : 5 + 6 * SECTOR]
    with file.open("r+b") as opened:  # changed in the cache, and not yet on the disk
        opened.seek(SECTOR)
        opened.write(b"changed")
        opened.flush()
        assert bytes(read_range(file, SECTOR, 7, around_cache=True)) == b"changed"


def test_a_range_half_of_which_is_in_the_cache(file: Path) -> None:
    read_range(file, 0, 2 * SECTOR)
    assert bytes(read_range(file, 9, 6 * SECTOR, around_cache=True)) == file.read_bytes()[9 : 9 + 6 * SECTOR]


@pytest.mark.parametrize("where", ["opening", "reading"])
def test_a_file_system_that_refuses_is_read_as_usual(file: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    refused: list[str] = []
    opened, read = os.open, os.preadv

    def no_opening(path: Any, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(where)
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest)

    def no_reading(descriptor: int, *rest: Any) -> int:
        if direct_io.fcntl.fcntl(descriptor, direct_io.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(where)
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(descriptor, *rest)

    if where == "opening":
        monkeypatch.setattr(os, "open", no_opening)
    else:
        monkeypatch.setattr(os, "preadv", no_reading)
    assert bytes(read_range(file, 3, 4 * SECTOR, around_cache=True)) == file.read_bytes()[3 : 3 + 4 * SECTOR]
    assert refused == [where]


def test_no_such_file_is_an_error(tmp_path: Path) -> None:
    for around_cache in (True, False):
        with pytest.raises(FileNotFoundError):
            read_range(tmp_path / "none", 0, 1, around_cache=around_cache)


@pytest.mark.parametrize("size", [0, 1, BUFFER - 1, BUFFER, 4 * BUFFER, 5 * BUFFER + 1, LARGE])
def test_what_is_written_is_there_and_hashed(tmp_path: Path, size: int) -> None:
    data, path = drawn(size), tmp_path / "file"
    with path.open("wb") as opened:
        with HashedFile(opened) as file:
            for start in range(0, size, 1234567):
                file.write(data[start : start + 1234567])
        assert opened.seek(0, os.SEEK_CUR) == size
        if direct_is_possible(path):
            assert not direct_io.fcntl.fcntl(opened.fileno(), direct_io.fcntl.F_GETFL) & os.O_DIRECT
    assert path.read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.position == size


def test_the_middle_of_a_large_file_is_not_left_in_the_cache(tmp_path: Path, file: Path) -> None:
    if in_memory(file) or not direct_is_possible(file):
        pytest.skip("this file system keeps its files in memory")
    path = tmp_path / "large"
    with path.open("wb") as opened:
        with HashedFile(opened) as hashed:
            hashed.write(bytes(LARGE))
        os.fsync(opened.fileno())
    assert in_memory(path, 4 * BUFFER, 5 * BUFFER) == 0
    assert in_memory(path, 0, 4 * BUFFER) > 0


@pytest.mark.parametrize("where", ["setting", "writing"])
def test_a_file_system_that_refuses_is_written_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    refused: list[str] = []
    control, write = direct_io.fcntl.fcntl, os.write

    def no_setting(descriptor: int, command: int, argument: int = 0) -> Any:
        if command == direct_io.fcntl.F_SETFL and argument & os.O_DIRECT:
            refused.append(where)
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(descriptor, command, argument)

    def no_writing(descriptor: int, data: Any) -> int:
        if control(descriptor, direct_io.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(where)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    if where == "setting":
        monkeypatch.setattr(direct_io.fcntl, "fcntl", no_setting)
    else:
        monkeypatch.setattr(os, "write", no_writing)
    data, path = drawn(LARGE), tmp_path / "file"
    with path.open("wb") as opened, HashedFile(opened) as file:
        file.write(data)
    assert path.read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert refused == [where]  # asked once, and not again


def test_data_may_change_once_it_is_appended(tmp_path: Path) -> None:
    data, path = bytearray(drawn(LARGE)), tmp_path / "file"
    expected = bytes(data)
    with path.open("wb") as opened, HashedFile(opened) as file:
        file.write(memoryview(data))
        data[:] = bytes(LARGE)
    assert path.read_bytes() == expected


def writers() -> int:
    return sum(thread.name.startswith("write") for thread in threading.enumerate())


def test_after_an_error_nothing_is_on_its_way_any_more(tmp_path: Path) -> None:
    before = writers()

    def fails() -> None:
        with (tmp_path / "file").open("wb") as opened, HashedFile(opened) as file:
            file.write(bytes(LARGE))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert writers() == before


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from phi4edge.core.atomic import atomic_file
from phi4edge.core.hashing import HashedFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
with atomic_file(Path(sys.argv[1])) as opened, HashedFile(opened) as file:
    for _ in range(40):
        file.write(bytes(1 << 20))
"""


@pytest.mark.parametrize("limit", [BUFFER // 2, 6 * BUFFER + SECTOR // 2, 7 * BUFFER + 5 * SECTOR])
def test_no_room_for_the_rest_is_said_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "file"), str(limit)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode
    assert "no room left on the disk" in ran.stderr
    assert not list(tmp_path.iterdir())
