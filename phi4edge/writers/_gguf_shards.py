"""Which tensor goes into which file of a GGUF in several, and the files' headers.

Names and layout are llama.cpp's (tools/gguf-split, llama_split_path): ``NAME-00001-of-0000N.gguf``; every file says
``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of the whole model), and only the first has the
other keys. Tensors keep their order, and rope factors are never a file's last ones, because llama.cpp reads past their
end (:func:`phi4edge.writers._gguf_tensors.plan_tensors`). gguf-split counts tensors against the size that was asked
for; here the whole file counts, since what sets such a limit is most often a file system or an upload.
"""

from __future__ import annotations

__all__ = ["ALIGNMENT", "Shard", "plan_shards", "shard_path", "shard_paths", "split_name", "write_shard"]

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from torch import Tensor

from phi4edge.core.errors import UsageError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import HashedFile
from phi4edge.core.memory import format_bytes
from phi4edge.quant.parallel import run_ahead
from phi4edge.writers._gguf_names import FACTORS
from phi4edge.writers._gguf_tensors import PlannedTensor

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_MOST = 99_999  # what five digits and split.count hold, the latter 65535
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class Shard:
    """One file to be: its header, and the tensors behind it."""

    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return _padded(len(self.header)) + sum(_padded(tensor.nbytes) for tensor in self.tensors)


def shard_path(out: Path, number: int, count: int) -> Path:
    """Path of file ``number`` (from 0) of ``count``, for the path ``out`` that the whole would have."""
    stem = out.name.removesuffix(".gguf")
    return out.with_name(f"{stem}-{number + 1:05d}-of-{count:05d}.gguf")


def split_name(path: Path) -> tuple[Path, int, int] | None:
    """The inverse of :func:`shard_path`, or None where ``path`` is not called so."""
    match = _NAME.fullmatch(path.name)
    return (path.with_name(f"{match[1]}.gguf"), int(match[2]) - 1, int(match[3])) if match else None


def shard_paths(out: Path) -> list[Path]:
    """Files of any split of ``out`` that lie beside it."""
    if not out.parent.is_dir():
        return []
    whole = f"{out.name.removesuffix('.gguf')}.gguf"
    found = ((path, split_name(path)) for path in out.parent.iterdir())
    return sorted(path for path, split in found if split is not None and split[0].name == whole)


def plan_shards(writer: gguf.GGUFWriter, tensors: Sequence[PlannedTensor], most: int | None) -> list[Shard]:
    """``tensors`` in files of at most ``most`` bytes each, headers included; one file without a ``split.`` key if
    all fit, or if ``most`` is None. ``writer`` holds the keys.

    The first file has no tensor where the first tensor does not fit beside the keys.

    Raises:
        UsageError: the keys, or one tensor alone, take more than ``most``.
    """
    whole = Shard(_header(writer, tensors), tuple(tensors))
    if most is None or whole.nbytes <= most:
        return [whole]
    rest = _empty_writer()
    for each in (writer, rest):  # with values that take the place of those that are not known yet
        _add_split(each, 0, 0, len(tensors))
    keys, few_keys = len(_header(writer, ())), len(_header(rest, ()))
    if _padded(keys) > most:
        raise UsageError(
            f"the file's keys (vocabulary, merges, configuration) take {format_bytes(keys)}, more than --split-size "
            f"{format_bytes(most)}",
            "give a larger one",
        )
    parts: list[list[PlannedTensor]] = [[]]
    names, data = keys, 0
    for tensor in tensors:
        entry, nbytes = _entry_bytes(tensor), _padded(tensor.nbytes)
        if _padded(names + entry) + data + nbytes > most:
            factors = _taken_off(parts[-1])
            parts.append(factors)
            names = few_keys + sum(_entry_bytes(factor) for factor in factors)
            data = sum(_padded(factor.nbytes) for factor in factors)
            if _padded(names + entry) + data + nbytes > most:
                raise UsageError(
                    f"{tensor.name} alone takes {format_bytes(nbytes)}, more than --split-size {format_bytes(most)}",
                    f"a tensor is never divided: give at least {_padded(names + entry) + data + nbytes} bytes",
                )
        parts[-1].append(tensor)
        names, data = names + entry, data + nbytes
    if len(parts) > min(_MOST, 0xFFFF):
        raise UsageError(f"--split-size {format_bytes(most)} makes {len(parts)} files, more than a GGUF can count")
    shards = []
    for number, part in enumerate(parts):
        each = writer if number == 0 else _empty_writer()
        _add_split(each, number, len(parts), len(tensors))
        shards.append(Shard(_header(each, part), tuple(part)))
    assert all(shard.nbytes <= most for shard in shards)
    return shards


def _taken_off(part: list[PlannedTensor]) -> list[PlannedTensor]:
    """The rope factors that ``part`` ends with; they go with the tensor that follows them."""
    taken: list[PlannedTensor] = []
    while part and part[-1].name in FACTORS.values():
        taken.insert(0, part.pop())
    return taken


def _add_split(writer: gguf.GGUFWriter, number: int, count: int, tensors: int) -> None:
    """The three keys, last and in gguf-split's order; they replace what stood for them."""
    keys = gguf.Keys.Split
    for key in (keys.LLM_KV_SPLIT_NO, keys.LLM_KV_SPLIT_TENSORS_COUNT, keys.LLM_KV_SPLIT_COUNT):
        writer.kv_data[0].pop(key, None)
    writer.add_uint16(keys.LLM_KV_SPLIT_NO, number)
    writer.add_int32(keys.LLM_KV_SPLIT_TENSORS_COUNT, tensors)
    writer.add_uint16(keys.LLM_KV_SPLIT_COUNT, count)


def _empty_writer() -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # it begins with the architecture, which only the first file names
    return writer


def _header(writer: gguf.GGUFWriter, tensors: Sequence[PlannedTensor]) -> bytes:
    """What gguf-py writes before the data of ``tensors``: magic, counts, keys and the tensors' entries."""
    other = gguf.GGUFWriter(None, "")  # a writer writes once
    other.kv_data[0].clear()
    other.kv_data[0].update(writer.kv_data[0])
    for tensor in tensors:
        other.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, gguf.GGMLQuantizationType(tensor.type.code)
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        other.write_header_to_file(path)
        other.write_kv_data_to_file()
        other.write_ti_data_to_file()
        other.close()
        return path.read_bytes()


def _entry_bytes(tensor: PlannedTensor) -> int:
    """Bytes of a tensor's entry: name, axes, type and offset."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def _padded(count: int) -> int:
    return int(count + -count % ALIGNMENT)


def write_shard(opened: BinaryIO, shard: Shard, progress: Progress) -> str:
    """Write one file, while its next pieces are packed; returns its SHA-256."""
    with HashedFile(opened) as file, closing(run_ahead(_pieces(shard.tensors))) as pieces:
        file.write(shard.header)
        for tensor, of_tensor in groupby(pieces, itemgetter(0)):
            progress.status(tensor.name)
            _pad(file)
            start = file.position
            for _, piece in of_tensor:
                file.write(piece.numpy().data)
            written = file.position - start
            assert written == tensor.nbytes, f"{tensor.name} has {written} bytes, {tensor.nbytes} were planned"
            progress.advance()
        _pad(file)
        assert file.position == shard.nbytes
    return file.sha256


def _pieces(tensors: Sequence[PlannedTensor]) -> Iterator[Callable[[], tuple[PlannedTensor, Tensor]]]:
    for tensor in tensors:
        for make in tensor.data():
            yield partial(_made, tensor, make)


def _made(tensor: PlannedTensor, make: Callable[[], Tensor]) -> tuple[PlannedTensor, Tensor]:
    return tensor, make().contiguous()


def _pad(file: HashedFile) -> None:
    file.write(bytes(-file.position % ALIGNMENT))
