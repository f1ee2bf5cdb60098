"""A block's file: safetensors, written tensor by tensor from where they lie in RAM, and hashed on the way."""

from __future__ import annotations

__all__ = ["write_block"]

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from phi4edge.core.atomic import atomic_file
from phi4edge.core.hashing import HashedFile


def write_block(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write ``tensors`` atomically to ``path``, with the bytes that the library gives them all at once; their SHA-256.

    The library would hold a second copy of them; the order that it puts them in, it tells of empty ones.

    Raises:
        TargetError: the disk is full.
    """
    header = _header(save({name: tensor.new_empty(0) for name, tensor in tensors.items()}))
    offset = 0
    for name, entry in header.items():
        entry["shape"] = list(tensors[name].shape)
        entry["data_offsets"] = [offset, offset + tensors[name].nbytes]
        offset += tensors[name].nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as opened, HashedFile(opened) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            if tensors[name].numel():
                file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return file.sha256


def _header(data: bytes) -> dict[str, dict[str, object]]:
    """A safetensors file's header, entries in the order of their data."""
    (length,) = struct.unpack_from("<Q", data)
    entries: dict[str, dict[str, object]] = json.loads(data[8 : 8 + length])
    return entries
