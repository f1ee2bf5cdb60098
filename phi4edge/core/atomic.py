"""Nothing appears under its final name before it is whole: write aside, fsync, rename.

A process killed at any instant leaves either the old content, the new content, or a stray
``.partial`` beside it that the next write of the same name clears away.
"""

from __future__ import annotations

__all__ = [
    "PARTIAL",
    "atomic_directory",
    "atomic_file",
    "atomic_files",
    "fsync_directory",
    "write_bytes",
    "write_json",
]

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from phi4edge.core.disk import full_disk, is_full
from phi4edge.core.errors import InputError

PARTIAL = ".partial"


def fsync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say_if_full(path: Path, error: BaseException) -> None:
    if isinstance(error, OSError) and is_full(error):
        raise full_disk(path, error) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; it takes its name only when the block ends without an error.

    Raises:
        TargetError: the disk is full; what was written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _say_if_full(path, error)
        raise


@contextmanager
def atomic_files(paths: Sequence[Path], *, replaced: Sequence[Path] = ()) -> Iterator[Iterator[BinaryIO]]:
    """Open ``paths`` for writing, one after the other; they take their names together, when all are whole.

    The first of them is the one by which the set is opened, so it takes its name last, and where it replaces
    another it goes first: at no instant can a mixture of an old and a new set be opened. ``replaced`` are files of
    an old set to be removed then.

    Raises:
        TargetError: the disk is full; what was written is removed.
    """
    partial = [path.with_name(path.name + PARTIAL) for path in paths]
    named: list[Path] = []
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)

    def opened() -> Iterator[BinaryIO]:
        for path in partial:
            with path.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())

    files = opened()
    try:
        yield files
        next(files, None)  # closes the last one
        assert all(path.is_file() for path in partial), "not every file was written"
        paths[0].unlink(missing_ok=True)
        for source, path in reversed(list(zip(partial, paths, strict=True))):
            source.replace(path)
            named.append(path)
        for path in set(replaced) - set(paths):
            path.unlink(missing_ok=True)
        fsync_directory(folder)
    except BaseException as error:
        for path in (*partial, *named):
            path.unlink(missing_ok=True)
        _say_if_full(paths[0], error)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, indented, keys in the order given."""
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a scratch directory that becomes ``path`` when the block ends without an error.

    Raises:
        InputError: ``path`` exists with something in it and ``replace`` is false.
        TargetError: the disk is full; what was written is removed.
    """
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already exists", "choose another --out, or pass --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(p for p in partial.rglob("*") if p.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
        partial.replace(path)
        fsync_directory(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _say_if_full(path, error)
        raise
