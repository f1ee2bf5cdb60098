"""llama.cpp's importance matrix: mean squares of every linear's inputs, as a file that its tools exchange.

Two forms (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp of llama.cpp), both read, the first also written:

* GGUF with ``general.type`` "imatrix", ``imatrix.datasets`` (texts), ``imatrix.chunk_count``, ``imatrix.chunk_size``,
  and of each tensor ``<name>.in_sum2`` [1, in_features] = Σx² and ``<name>.counts`` [1, 1] = tokens, float32, names
  sorted;
* the older binary: int32 entries; each int32 length, name, int32 calls, int32 values, float32 means × calls; and
  after them, where it goes on, int32 chunks, int32 length and the data set's name.

llama-quantize divides sum by count in float32, and so does the reader here: it takes the very numbers that llama.cpp
would. A mean that goes through a file comes back exactly where the count is a power of two, else within 2⁻²³ of it.
"""

from __future__ import annotations

__all__ = ["Imatrix", "read_imatrix", "write_imatrix"]

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from torch import Tensor

from phi4edge.core.atomic import atomic_file
from phi4edge.core.errors import InputError
from phi4edge.core.events import SILENT
from phi4edge.quant.ggml import BLOCK_TYPES
from phi4edge.writers._gguf_file import MAGIC, GgufFile, GgufTensor, read_gguf, read_rows
from phi4edge.writers._gguf_names import checkpoint_name, gguf_name
from phi4edge.writers._gguf_shards import plan_shards, write_shard
from phi4edge.writers._gguf_tensors import PlannedTensor

_SUMS, _COUNTS, _TYPE = ".in_sum2", ".counts", "general.type"
_HINT = "give what llama-imatrix wrote, or `phi4edge export RUN --format imatrix`"


@dataclass(frozen=True)
class Imatrix:
    """Mean squared inputs of linears, and what they were measured on."""

    values: Mapping[str, Tensor]  # linear (the checkpoint's name, no ".weight") → [in_features] float32, means
    tokens: int  # that the means are over; of the older form: calls
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0  # tokens; 0 where the file does not say

    def check(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Hold the matrix against a model's linears, name → (out_features, in_features).

        Raises:
            InputError: a linear is missing, has another width, or values that are no squares.
        """
        missing = [name for name in shapes if name not in self.values]
        if missing:
            raise InputError(
                f"{where}: {len(missing)} of the model's {len(shapes)} linears are not in it, such as {missing[0]}",
                "it was measured on another model, or llama.cpp split a fused projection; measure this one",
            )
        for name, shape in shapes.items():
            values = self.values[name]
            if values.shape[0] != shape[1]:
                raise InputError(f"{where}: {name} has {values.shape[0]} values, the model {shape[1]} input channels")
            if not bool(torch.isfinite(values).all()) or bool((values < 0).any()) or not bool(values.any()):
                raise InputError(f"{where}: {name} holds values that are no mean squares (negative, NaN or all zero)")


def write_imatrix(path: Path, imatrix: Imatrix) -> str:
    """Write the GGUF form; returns its SHA-256."""
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # it begins with an architecture, of which such a file has none
    writer.add_type("imatrix")
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(imatrix.datasets))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, imatrix.chunks)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, imatrix.chunk_size)
    plan = []
    for name, values in sorted((_stored_name(linear), values) for linear, values in imatrix.values.items()):
        sums = values.double().mul(imatrix.tokens).float()[None]
        plan.append(_planned(f"{name}{_SUMS}", sums))
        plan.append(_planned(f"{name}{_COUNTS}", torch.full((1, 1), float(imatrix.tokens))))
    (shard,) = plan_shards(writer, plan, None)
    with atomic_file(path) as file:
        return write_shard(file, shard, SILENT)


def _stored_name(linear: str) -> str:
    name = gguf_name(f"{linear}.weight")
    assert name is not None, f"{linear} has no place in a GGUF"
    return name


def _planned(name: str, values: Tensor) -> PlannedTensor:
    def data() -> Tensor:
        return values.contiguous().view(torch.uint8)

    return PlannedTensor(name, BLOCK_TYPES["f32"], tuple(values.shape), lambda: iter([data]))


def read_imatrix(path: Path) -> Imatrix:
    """Read either form; entries of tensors that are no linear of a block (the head's) are passed over.

    Raises:
        InputError: no such file, another file, a damaged one, or one with experts.
    """
    try:
        with path.open("rb") as file:
            begins = file.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return _read_gguf(path) if begins == MAGIC else _read_binary(path)


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    kind = file.metadata.get(_TYPE)
    if kind != "imatrix":
        raise InputError(f"{path}: general.type is {kind!r}, not 'imatrix'", _HINT)
    names = {name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)}
    names |= {name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)}
    values, tokens = {}, 0
    for name in sorted(names):
        linear = _linear(name)
        if linear is None:
            continue
        sums, counts = (_floats(file, f"{name}{suffix}") for suffix in (_SUMS, _COUNTS))
        if counts.numel() != 1:
            raise InputError(f"{path}: {name} has {counts.numel()} counts, one for each expert; this family has none")
        count = round(float(counts[0]))
        if count <= 0:
            raise InputError(f"{path}: {name} was measured on no token", "measure it on more text")
        values[linear], tokens = sums / torch.tensor(float(count)), max(tokens, count)
    if not values:
        raise InputError(f"{path}: holds no linear of a block", _HINT)
    datasets = file.metadata.get(gguf.Keys.IMatrix.DATASETS, [])
    chunks, size = (file.metadata.get(k, 0) for k in (gguf.Keys.IMatrix.CHUNK_COUNT, gguf.Keys.IMatrix.CHUNK_SIZE))
    return Imatrix(values, tokens, tuple(map(str, datasets)), int(chunks), int(size))


def _floats(file: GgufFile, name: str) -> Tensor:
    tensor: GgufTensor | None = file.tensors.get(name)
    if tensor is None:
        raise InputError(f"{file.path}: tensor {name} is missing", "the file is damaged")
    if tensor.type != gguf.GGMLQuantizationType.F32:
        raise InputError(f"{file.path}: {name} is {tensor.type.name}, expected F32", "the file is damaged")
    return read_rows(tensor).view(torch.float32).reshape(-1)


def _read_binary(path: Path) -> Imatrix:
    data, at = path.read_bytes(), 0

    def take(count: int, what: str) -> bytes:
        nonlocal at
        if count < 0 or count > len(data) - at:
            raise InputError(f"{path}: {what} needs {count} bytes at byte {at}, but the file has {len(data)}", _HINT)
        at += count
        return data[at - count : at]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    entries = number("the number of entries")
    if not 0 < entries <= len(data) // 12:
        raise InputError(f"{path}: neither a GGUF nor an imatrix ({entries} entries in {len(data)} bytes)", _HINT)
    values, most = {}, 0
    for _ in range(entries):
        name = take(number("the length of a name"), "a name").decode("utf-8", errors="replace")
        calls, count = number(f"calls of {name}"), number(f"values of {name}")
        means = torch.frombuffer(bytearray(take(4 * count, name)), dtype=torch.float32)
        linear = _linear(name)
        if linear is not None:
            values[linear], most = means / torch.tensor(float(calls)) if calls > 0 else means, max(most, calls)
    if not values:
        raise InputError(f"{path}: holds no linear of a block", _HINT)
    chunks = number("the number of chunks") if at < len(data) else 0
    dataset = take(number("the length of the text's name"), "the text's name").decode() if at < len(data) else ""
    return Imatrix(values, most, (dataset,) if dataset else (), chunks)


def _linear(name: str) -> str | None:
    found = checkpoint_name(name)
    return found.removesuffix(".weight") if found is not None and ".layers." in found else None
