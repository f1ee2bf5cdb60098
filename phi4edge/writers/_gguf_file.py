"""A GGUF file's header, read by a bounded cursor and checked against the file before anything relies on it.

Layout (little-endian): magic, version, number of tensors, number of keys; the keys, each with type and value; for
each tensor name, shape (fastest axis first), type and offset; then, aligned, the tensors' data. Numbers in a header
are claims: every length is held against what the file still has, every tensor's span against the file's size.

A model in several files (:mod:`phi4edge.writers._gguf_shards`) is opened by its first, which names their number.
"""

from __future__ import annotations

__all__ = ["MAGIC", "GgufFile", "GgufTensor", "read_gguf", "read_rows"]

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.writers._gguf_shards import shard_path, split_name

MAGIC = b"GGUF"
_DAMAGED = "the file is truncated or damaged; export or download it again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies; nothing of it has been read."""

    path: Path  # the file that holds it
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # slowest axis first, as torch has it
    offset: int  # from the start of the file, bytes
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // max(self.rows, 1)


@dataclass(frozen=True)
class GgufFile:
    """Keys and tensors of a GGUF, in one file or several."""

    path: Path  # the first file
    files: tuple[Path, ...]  # all of them, in order
    metadata: Mapping[str, Any]  # the first file's
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """Reads forward and refuses to pass the end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.position = file, path, size, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise InputError(
                f"{self.path}: {what} needs {count} bytes at byte {self.position}, but the file has {self.size}",
                _DAMAGED,
            )
        self.position += count
        return self.file.read(count)

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", f"length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} is not UTF-8", _DAMAGED) from error

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise InputError(f"{self.path}: {what} has unknown type {kind}", _DAMAGED)
        item, count = self.number("I", what), self.number("Q", what)
        if item in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[item]}")
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * width, what)))
        if item != _STRING:
            raise InputError(f"{self.path}: {what} is a list of unknown type {item}", _DAMAGED)
        if count > (self.size - self.position) // 8:  # a string takes 8 bytes at least
            raise InputError(f"{self.path}: {what} claims {count} entries, more than the file can hold", _DAMAGED)
        return [self.string(what) for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """Keys and tensor places of a GGUF of version 2 or 3; no tensor's data is read.

    ``path`` is the first file where there are several; the others are looked for beside it.

    Raises:
        InputError: not such a file, truncated, or with a header that contradicts the file; not the first one; or
            another file of the split is missing or belongs to another.
    """
    first = _read_one(path)
    count = _split_number(first, "count", 0)
    if count <= 1:
        return first
    named, number = split_name(path), _split_number(first, "no")
    if named is None or named[2] != count or named[1] != number:
        raise InputError(
            f"{path}: is file {number + 1} of {count}, and its name does not say so",
            f"llama.cpp finds the others by their names: {shard_path(path, number, count).name}",
        )
    if number != 0:
        raise InputError(f"{path}: is file {number + 1} of {count}", f"give {shard_path(named[0], 0, count).name}")
    tensors, paths = dict(first.tensors), [shard_path(named[0], i, count) for i in range(count)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of its {count} files are missing: {', '.join(missing[:3])}",
            "put all files of the split into one folder",
        )
    for i, other in enumerate(paths[1:], 1):
        part = _read_one(other)
        found = _split_number(part, "no"), _split_number(part, "count")
        if found != (i, count):
            raise InputError(
                f"{other}: says that it is file {found[0] + 1} of {found[1]}, its name says {i + 1} of {count}"
            )
        twice = sorted(tensors.keys() & part.tensors.keys())
        if twice:
            raise InputError(f"{other}: tensor {twice[0]} stands in {tensors[twice[0]].path.name} too", _DAMAGED)
        tensors |= part.tensors
    total = _split_number(first, "tensors.count", len(tensors))
    if total != len(tensors):
        raise InputError(f"{path}: its {count} files hold {len(tensors)} tensors, {total} were written", _DAMAGED)
    return GgufFile(path, tuple(paths), first.metadata, tensors)


def _split_number(file: GgufFile, name: str, default: int | None = None) -> int:
    value = file.metadata.get(f"split.{name}", default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{file.path}: split.{name} is {value!r}, expected a whole number", _DAMAGED)
    return value


def _read_one(path: Path) -> GgufFile:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(_Cursor(file, path, size))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _read(cursor: _Cursor) -> GgufFile:
    path = cursor.path
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise InputError(f"{path}: begins with {magic!r}, a GGUF file with {MAGIC!r}", "give a .gguf file")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version {version} is not supported", "versions 2 and 3, little-endian, are")
    tensor_count, key_count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("a key")
        if key in metadata:
            raise InputError(f"{path}: key {key} stands in it twice", _DAMAGED)
        metadata[key] = cursor.value(cursor.number("I", key), key)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise InputError(f"{path}: general.alignment is {alignment!r}", _DAMAGED)
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    start = cursor.position + -cursor.position % alignment
    tensors: dict[str, GgufTensor] = {}
    for name, code, shape, offset in entries:
        if name in tensors:
            raise InputError(f"{path}: tensor {name} stands in it twice", _DAMAGED)
        if offset % alignment:
            raise InputError(
                f"{path}: {name} begins at {offset}, not a multiple of the alignment {alignment}", _DAMAGED
            )
        tensors[name] = _placed(path, cursor.size, name, code, shape, start + offset)
    return GgufFile(path, (path,), metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string("a tensor's name")
    axes = cursor.number("I", name)
    if not 1 <= axes <= 4:
        raise InputError(f"{cursor.path}: {name} has {axes} axes, 1 to 4 are possible", _DAMAGED)
    shape = tuple(cursor.number("Q", name) for _ in range(axes))[::-1]
    return name, cursor.number("I", name), shape, cursor.number("Q", name)


def _placed(path: Path, size: int, name: str, code: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise InputError(
            f"{path}: {name} has unknown tensor type {code}", "a newer format, or a damaged file"
        ) from error
    weights, block = GGML_QUANT_SIZES[kind]
    if shape[-1] % weights:
        raise InputError(f"{path}: {name}: rows of {shape[-1]} weights are not whole {kind.name} blocks of {weights}")
    nbytes = shape[-1] // weights * block
    for axis in shape[:-1]:
        nbytes *= axis
    if offset + nbytes > size:
        raise InputError(f"{path}: {name} ends at byte {offset + nbytes}, but the file has {size}", _DAMAGED)
    return GgufTensor(path, name, kind, shape, offset, nbytes)


def read_rows(tensor: GgufTensor, rows: slice | None = None) -> Tensor:
    """Bytes of ``tensor``'s rows (or of ``rows`` of them), uint8 [rows, bytes of a row], by positional reads.

    Raises:
        InputError: the file ends early or cannot be read.
    """
    start, stop, _ = (rows or slice(None)).indices(tensor.rows)
    count = max(stop - start, 0)
    buffer: NDArray[np.uint8] = np.empty(count * tensor.row_bytes, dtype=np.uint8)
    position, done = tensor.offset + start * tensor.row_bytes, 0
    try:
        with open(tensor.path, "rb", buffering=0) as handle:
            while done < len(buffer):
                read = os.preadv(handle.fileno(), [buffer.data[done:]], position + done)
                if read == 0:
                    raise InputError(
                        f"{tensor.path}: {tensor.name}: file ends {len(buffer) - done} bytes early", _DAMAGED
                    )
                done += read
    except OSError as error:
        raise InputError(f"{tensor.path}: cannot be read ({error.strerror})") from error
    return torch.from_numpy(buffer).reshape(count, tensor.row_bytes)
