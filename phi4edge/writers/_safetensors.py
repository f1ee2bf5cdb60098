"""Safetensors files written in order, tensor by tensor, whatever their size.

The header comes first in the file and needs only names, dtypes and shapes, so it is computed from a
plan; the data then passes through, one piece in RAM at a time. Files are split where the plan says,
with the index that Hugging Face libraries read.
"""

from __future__ import annotations

__all__ = ["Piece", "PlannedTensor", "planned_bytes", "write_safetensors"]

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phi4edge.checkpoint.index import DTYPE_BYTES
from phi4edge.core.ahead import ahead
from phi4edge.core.atomic import write_json
from phi4edge.core.hashing import HashedFile

Piece = tuple[str, Tensor]  # tensor name and its next bytes, as a tensor of the planned dtype


@dataclass(frozen=True)
class PlannedTensor:
    """What the header says of one tensor."""

    name: str
    dtype: str  # safetensors' name, e.g. "BF16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def planned_bytes(plan: Sequence[PlannedTensor]) -> int:
    """Bytes of the data of all tensors in ``plan``."""
    return sum(tensor.nbytes for tensor in plan)


def write_safetensors(
    folder: Path,
    plan: Sequence[PlannedTensor],
    pieces: Iterator[Piece],
    *,
    shard_bytes: int,
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Write ``plan`` into ``folder`` as model.safetensors, or as shards of at most ``shard_bytes`` with an index.

    Returns the SHA-256 of each safetensors file by its name, taken while it was written.

    ``pieces`` gives every tensor's data in the order of the plan, a tensor in one piece or several.
    A tensor larger than ``shard_bytes`` has a shard of its own.
    """
    shards, pieces = _split(plan, shard_bytes), ahead(pieces)
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as opened, HashedFile(opened) as file:
            file.write(_header(shard, metadata))
            for tensor in shard:
                _copy(file, tensor, pieces)
        digests[name] = file.sha256
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    assert next(pieces, None) is None, "data beyond the plan"
    if len(shards) > 1:
        index = {"metadata": {"total_size": planned_bytes(plan)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return digests


def _split(plan: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _header(shard: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in shard:
        # Readers view the mapped bytes as dtype; the format allows no padding between tensors.
        assert offset % DTYPE_BYTES[tensor.dtype] == 0, f"{tensor.name} would lie unaligned"
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(file: HashedFile, tensor: PlannedTensor, pieces: Iterator[Piece]) -> None:
    left = tensor.nbytes
    while left:
        name, piece = next(pieces)
        assert name == tensor.name, f"data of {name} where {tensor.name} is planned"
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        left -= len(data)
        assert left >= 0, f"{name} has {-left} bytes more than planned"
        file.write(data)
