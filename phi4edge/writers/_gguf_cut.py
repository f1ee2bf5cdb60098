"""One GGUF file as several, without copying it: new headers, and stretches of the file behind them.

For those who cannot take a large file whole, such as a browser. The parts are those of llama.cpp's gguf-split, as
:mod:`phi4edge.writers._gguf_shards` describes them; only that the order and the bytes of the data are the file's own,
so that a part is a header in memory and one stretch of the file on disk.
"""

from __future__ import annotations

__all__ = ["Part", "cut_gguf"]

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf

from phi4edge.core.errors import UsageError
from phi4edge.core.memory import format_bytes
from phi4edge.writers._gguf_file import GgufFile, GgufTensor
from phi4edge.writers._gguf_names import FACTORS

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT16, _UINT32, _INT32 = 8, 9, 2, 4, 5
_LARGEST = 2**31 - 1  # what a part may have: readers that count in 32 bits end there


@dataclass(frozen=True)
class Part:
    """One part: ``header``, then ``nbytes`` of ``path`` from ``offset`` on."""

    header: bytes
    path: Path
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole part."""
        return len(self.header) + self.nbytes


def cut_gguf(file: GgufFile, most: int) -> list[Part]:
    """``file`` in parts of about ``most`` bytes: a tensor is never divided, and its part is as large as it must be.

    A file of at most ``most`` bytes is one part, itself; so is each file of a GGUF that is in several already.

    Raises:
        UsageError: a part, or a file of several, would have 2 GiB or more.
    """
    sizes = [path.stat().st_size for path in file.files]
    if len(file.files) > 1 or sizes[0] <= most:
        parts = [Part(b"", path, 0, size) for path, size in zip(file.files, sizes, strict=True)]
    else:
        parts = _cut(file, most, sizes[0])
    for part in parts:
        if part.size > _LARGEST:
            raise UsageError(
                f"{part.path}: a file of {format_bytes(part.size)} is more than 2 GiB",
                "write it anew in smaller ones: phi4edge export RUN --format gguf --split-size 512MiB --out FILE.gguf",
            )
    return parts


def _cut(file: GgufFile, most: int, size: int) -> list[Part]:
    tensors = sorted(file.tensors.values(), key=lambda tensor: tensor.offset)
    alignment = int(file.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    version, count, keys = _keys(file.path)
    ends = [tensor.offset for tensor in tensors[1:]] + [size]
    groups: list[list[GgufTensor]] = [[]]
    begin = tensors[0].offset
    for tensor, end in zip(tensors, ends, strict=True):
        head = len(keys) if len(groups) == 1 else 0
        if groups[-1] and head + end - begin > most:
            factors = _taken_off(groups[-1])
            if groups[-1]:
                groups.append(factors)
            else:
                groups[-1] = factors
            begin = (factors or [tensor])[0].offset
        groups[-1].append(tensor)
    firsts = [group[0].offset for group in groups] + [size]
    parts = []
    for number, group in enumerate(groups):
        own = _split_keys(number, len(groups), len(tensors))
        head_keys, head_count = (keys, count) if number == 0 else (_key("general.alignment", _UINT32, alignment), 1)
        header = _header(version, head_keys + own, head_count + 3, group, alignment)
        parts.append(Part(header, file.path, firsts[number], firsts[number + 1] - firsts[number]))
    return parts


def _taken_off(group: list[GgufTensor]) -> list[GgufTensor]:
    """The rope factors that ``group`` ends with, which may not be a file's last."""
    taken: list[GgufTensor] = []
    while group and group[-1].name in FACTORS.values():
        taken.insert(0, group.pop())
    return taken


def _keys(path: Path) -> tuple[int, int, bytes]:
    """Version, number of keys, and the keys as they stand in the file, which was read and found whole before."""
    with path.open("rb") as file:
        _, version, _, count = struct.unpack("<4sIQQ", file.read(24))
        for _ in range(count):
            _skip_string(file)
            _skip(file, _number(file, "I"))
        end = file.tell()
        file.seek(24)
        return version, count, file.read(end - 24)


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _skip_string(file)
    elif kind == _ARRAY:
        item, count = _number(file, "I"), _number(file, "Q")
        if item in _WIDTHS:
            file.seek(count * _WIDTHS[item], 1)
        else:
            for _ in range(count):
                _skip(file, item)
    else:
        file.seek(_WIDTHS[kind], 1)


def _skip_string(file: BinaryIO) -> None:
    file.seek(_number(file, "Q"), 1)


def _number(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0])


def _key(name: str, kind: int, value: int) -> bytes:
    code = {_UINT16: "H", _UINT32: "I", _INT32: "i"}[kind]
    return struct.pack(f"<Q{len(name)}sI{code}", len(name), name.encode(), kind, value)


def _split_keys(number: int, count: int, tensors: int) -> bytes:
    keys = gguf.Keys.Split
    return (
        _key(keys.LLM_KV_SPLIT_NO, _UINT16, number)
        + _key(keys.LLM_KV_SPLIT_TENSORS_COUNT, _INT32, tensors)
        + _key(keys.LLM_KV_SPLIT_COUNT, _UINT16, count)
    )


def _header(version: int, keys: bytes, count: int, tensors: Sequence[GgufTensor], alignment: int) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", version, len(tensors), count), keys]
    for tensor in tensors:
        name, shape = tensor.name.encode(), tensor.shape[::-1]
        parts.append(struct.pack(f"<Q{len(name)}sI{len(shape)}Q", len(name), name, len(shape), *shape))
        parts.append(struct.pack("<IQ", int(tensor.type), tensor.offset - tensors[0].offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)
