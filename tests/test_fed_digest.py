"""Files hashed from what others read of them: the right hash, whatever comes when, and nothing waits for ever."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi4edge.checkpoint import fed_digest
from phi4edge.checkpoint.fed_digest import FedDigest, Segment, StoppedError
from phi4edge.checkpoint.index import TensorRef
from phi4edge.core.errors import InputError

PIECE = 1000


def written(path: Path, nbytes: int) -> Path:
    path.write_bytes(np.random.default_rng(nbytes).bytes(nbytes))
    return path


def expected(files: Sequence[Path]) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """What a digest reads itself."""
    found: list[Segment] = []
    read = fed_digest.read_piece

    def noted(path: Path, start: int, stop: int, *rest: Any) -> Any:
        found.append((path, start, stop))
        return read(path, start, stop, *rest)

    monkeypatch.setattr(fed_digest, "read_piece", noted)
    return found


def use(digest: FedDigest, segment: Segment) -> None:
    """Read a piece, show it, and be done with it."""
    path, start, stop = segment
    digest.coming(path, start)
    data = bytearray(path.read_bytes()[start:stop])
    digest.show(path, start, memoryview(data))
    digest.release(path, start)
    data[:] = bytes(len(data))  # its memory is another's now


def hashed(files: Sequence[Path], wanted: Sequence[Segment], users: int = 1) -> Any:
    digest = FedDigest(files, [], wanted, around_cache=False)
    with ThreadPoolExecutor(1 + users) as threads:
        found = threads.submit(digest.run)
        try:
            for used in [threads.submit(use, digest, segment) for segment in wanted]:
                used.result(30)
            return found.result(30)
        finally:
            digest.stop()


def cut(path: Path, start: int, stop: int) -> list[Segment]:
    return [(path, at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]


def test_what_is_shown_in_order_is_not_read_again(tmp_path: Path, read_here: list[Segment]) -> None:
    one, two = written(tmp_path / "one", 10_000), written(tmp_path / "two", 7_777)
    wanted = [*cut(one, 100, 5_000), *cut(one, 5_050, 10_000), *cut(two, 0, 7_000)]
    assert hashed([one, two], wanted) == expected([one, two])
    assert sorted(read_here) == [(one, 0, 100), (one, 5_000, 5_050), (two, 7_000, 7_777)]


@pytest.mark.parametrize("near", [0, 1 << 28])
def test_what_is_shown_too_early_is_read_again(
    tmp_path: Path, read_here: list[Segment], monkeypatch: pytest.MonkeyPatch, near: int
) -> None:
    """A file that has blocks 10 to 13 before blocks 6 to 9."""
    monkeypatch.setattr(fed_digest, "_NEAR", near)
    path = written(tmp_path / "file", 80_000)
    late, early = cut(path, 0, 40_000), cut(path, 40_000, 80_000)
    assert hashed([path], [*early, *late]) == expected([path])
    again = sum(stop - start for _, start, stop in read_here)
    assert again <= 40_000
    if not near:  # nobody waited, so all that came early is read again, and nothing else
        assert again == 40_000


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("users", [1, 3])
def test_any_order_gives_the_hash_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, users: int
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(fed_digest, "_NEAR", draw.choice([0, 3_000, 1 << 28]))
    monkeypatch.setattr(fed_digest, "PIECE", 700)
    files = [written(tmp_path / str(i), draw.randrange(30_000)) for i in range(3)]
    wanted = [piece for path in files for piece in cut(path, 0, path.stat().st_size) if draw.random() < 0.8]
    if seed % 3:
        draw.shuffle(wanted)
    assert hashed(files, wanted, users) == expected(files)


def test_nothing_wanted_is_all_read_here(tmp_path: Path) -> None:
    files = [written(tmp_path / "one", 5_000_000), written(tmp_path / "none", 0)]
    assert hashed(files, []) == expected(files)


def test_values_that_are_read_here_are_looked_at(tmp_path: Path) -> None:
    path = written(tmp_path / "file", 64)
    values = np.zeros(4_000, np.uint16)
    values[3_333] = 0x7FC0  # NaN in bfloat16
    with path.open("ab") as file:
        file.write(values.tobytes())
    ref = TensorRef("weight", "BF16", (40, 100), path, 64, values.nbytes)
    with pytest.raises(InputError, match=r"weight holds 1 value.* the first at \[33, 33\]"):
        FedDigest([path], [ref], [], around_cache=False).run()


def running(call: Callable[[], object]) -> Future[object]:
    found: Future[object] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def test_who_waits_for_a_digest_that_fails_waits_no_longer(tmp_path: Path) -> None:
    path = written(tmp_path / "file", 4_000)
    digest = FedDigest([path], [], [(path, 2_000, 3_000)], around_cache=False)
    digest.coming(path, 2_000)
    digest.show(path, 2_000, memoryview(bytes(1_000)))
    waiting = running(lambda: digest.release(path, 2_000))
    with pytest.raises(TimeoutError):  # bytes before it come first
        waiting.result(0.2)
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="ends 1995 bytes early"):
        digest.run()
    waiting.result(10)


def test_a_digest_that_is_stopped_ends_and_holds_nobody(tmp_path: Path) -> None:
    path = written(tmp_path / "file", 4_000)
    digest = FedDigest([path], [], [(path, 0, 1_000)], around_cache=False)
    ended = running(digest.run)
    with pytest.raises(TimeoutError):  # it waits for what was announced
        ended.result(0.2)
    digest.stop()
    with pytest.raises(StoppedError):
        ended.result(10)
    use(digest, (path, 0, 1_000))
