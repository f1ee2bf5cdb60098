"""What tensors a checkpoint holds and where their bytes lie, read from safetensors headers alone.

A header is trusted only after it was checked against the file: its length, every tensor's span, and
that span against dtype × shape. Starts without torch and reads no weight.
"""

from __future__ import annotations

__all__ = ["DTYPE_BYTES", "FLOATS", "CheckpointIndex", "TensorRef", "open_index", "read_header"]

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.config import ModelConfig, load_config
from phi4edge.checkpoint.hub import model_name
from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file, sha256_json

DTYPE_BYTES = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8,
    "I8": 1, "U8": 1, "I16": 2, "I32": 4, "U32": 4, "I64": 8, "BOOL": 1,
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32")
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies; nothing of it has been read."""

    name: str
    dtype: str  # safetensors' name, e.g. "BF16"
    shape: tuple[int, ...]
    path: Path
    offset: int  # from the start of the file, bytes
    nbytes: int


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint folder: its config and its tensors by name."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorRef]

    @property
    def name(self) -> str:
        """What the model is called."""
        return model_name(self.folder, self.config.raw)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({ref.path for ref in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def block_bytes(self, layer: int) -> int:
        """Bytes of one block's tensors as stored."""
        prefix = f"model.layers.{layer}."
        return sum(ref.nbytes for name, ref in self.tensors.items() if name.startswith(prefix))

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Config and tokenizer files that an artifact needs beside the weights."""
        return tuple(self.folder / name for name in SIDE_FILES if (self.folder / name).is_file())

    def content_hashes(self) -> dict[str, str]:
        """SHA-256 of every file that shapes a result, by file name; reads all weights once."""
        return {path.name: sha256_file(path) for path in (*self.side_files, *self.shards)}

    def fingerprint(self) -> str:
        """One hash over :meth:`content_hashes`."""
        return sha256_json(self.content_hashes())


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file.

    Raises:
        InputError: the file is missing or truncated, or its header contradicts the file or itself.
    """
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise InputError(f"{path}: {size} bytes are too few for a safetensors file", "download it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(
                    f"{path}: header says it is {length} bytes long, but only {size - 8} bytes follow",
                    "the file is truncated or not safetensors; download it again",
                )
            text = file.read(length)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", "the checkpoint is incomplete; download the missing shard") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: safetensors header is not JSON ({error})", "download it again") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: safetensors header is not a JSON object")
    return {name: _checked(name, e, path, 8 + length, size) for name, e in header.items() if name != "__metadata__"}


def _checked(name: str, entry: Any, path: Path, base: int, size: int) -> TensorRef:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {name}: malformed header entry {entry!r}") from error
    if dtype not in DTYPE_BYTES:
        raise InputError(f"{path}: {name}: dtype {dtype} is not supported", f"known: {', '.join(DTYPE_BYTES)}")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if begin < 0 or end - begin != needed or min(shape, default=1) < 0:
        raise InputError(
            f"{path}: {name}: header gives it {end - begin} bytes, but {dtype} {list(shape)} takes {needed}",
            "the header is damaged; download the shard again",
        )
    if base + end > size:
        raise InputError(
            f"{path}: {name}: ends at byte {base + end}, but the file has {size}",
            "the shard is truncated; download it again",
        )
    return TensorRef(name, dtype, shape, path, base + begin, needed)


def _shard_paths(folder: Path) -> tuple[list[Path], dict[str, str]]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise InputError(f"{folder}: no *.safetensors in it", "convert the weights to safetensors first")
        return found, {}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index ({error})") from error
    for file in set(names.values()):
        if Path(file).name != file:
            raise InputError(f"{index}: shard name {file!r} leaves the folder")
    return [folder / file for file in sorted(set(names.values()))], names


def open_index(folder: Path, *, check: bool = True) -> CheckpointIndex:
    """Open a checkpoint folder: config, headers, and (``check``) every tensor's presence, shape and dtype.

    Raises:
        InputError: anything that would make a later stage fail or lie.
    """
    config = load_config(folder)
    paths, weight_map = _shard_paths(folder)
    tensors: dict[str, TensorRef] = {}
    for path in paths:
        for name, ref in read_header(path).items():
            if name in tensors:
                raise InputError(f"{name}: stands in {tensors[name].path.name} and again in {path.name}")
            tensors[name] = ref
    for name, file in weight_map.items():
        if name not in tensors:
            raise InputError(f"{folder / file}: {name} is missing, though the index says it is there")
    index = CheckpointIndex(folder, config, tensors)
    if check:
        _check_tensors(index)
    return index


def _check_tensors(index: CheckpointIndex) -> None:
    for name, shape in index.config.tensor_shapes().items():
        ref = index.tensors.get(name)
        if ref is None:
            raise InputError(f"{index.folder}: tensor {name} is missing", "the checkpoint is incomplete")
        if ref.shape != shape:
            raise InputError(
                f"{ref.path.name}: {name} has shape {list(ref.shape)}, config.json says {list(shape)}",
                "config.json and the weights do not belong together",
            )
        if ref.dtype not in FLOATS:
            raise InputError(
                f"{ref.path.name}: {name} is {ref.dtype}; full-precision weights are needed ({', '.join(FLOATS)})"
            )
