"""Reads a GGUF of architecture phi3 back: its codes, its weights and the model's configuration."""

from __future__ import annotations

__all__ = ["GgufReader", "matches", "read"]

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import InputError, UsageError
from phi4edge.quant.ggml import BLOCK_TYPES, block_type_of, dequantize, unpack_linear
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme, parse_scheme
from phi4edge.writers._gguf_file import MAGIC, GgufFile, GgufTensor, read_gguf, read_rows
from phi4edge.writers._gguf_metadata import EXCEPTIONS, SCHEME, read_config
from phi4edge.writers._gguf_names import FACTORS, checkpoint_name, gguf_name

_BY_CODE = {block.code: block for block in BLOCK_TYPES.values()}


def matches(path: Path) -> bool:
    """Whether ``path`` is a file that begins as a GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@dataclass(frozen=True)
class GgufReader:
    """A GGUF as a source of weights and of their codes; each call reads what it is asked for."""

    file: GgufFile
    config: ModelConfig
    scheme: Scheme | None  # of the blocks' linears, where the file says it; else each type is its own scheme
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)  # linears on another scheme

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's keys and values."""
        return self.file.metadata

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor by checkpoint name, float32, dequantized.

        Raises:
            InputError: no such tensor, or damaged data.
        """
        found = self._find(name)
        if found is None:
            raise InputError(f"{self.file.path}: tensor {name} is missing")
        packed = read_rows(found, rows if len(found.shape) > 1 else None)
        block = _BY_CODE.get(int(found.type))
        if block is not None:
            values = dequantize(block, packed)
        else:  # a type that others write, such as iq4_nl
            values = torch.from_numpy(gguf.dequantize(packed.numpy(), found.type))
        if len(found.shape) > 1:
            return values
        return values[0] if rows is None else values[0][rows]

    def quantized(self, name: str) -> QuantizedLinear | None:
        """Codes of linear ``name`` (no ".weight"), or None where its type has none in the sense of a scheme.

        Raises:
            InputError: damaged data.
        """
        found = self._find(f"{name}.weight")
        block = _BY_CODE.get(int(found.type)) if found is not None else None
        if found is None or block is None or block.name not in GGML_SCHEMES:
            return None
        scheme = self.exceptions.get(name, self.scheme) if ".layers." in name else None
        if scheme is not None and block_type_of(scheme) != block:
            raise InputError(f"{self.file.path}: {name} is {block.name}, but the file says {scheme.name}")
        return unpack_linear(name, block, read_rows(found), scheme)

    def stored_type(self, name: str) -> str:
        """Type in which tensor ``name`` is stored, as GGML calls it, in small letters."""
        found = self._find(name)
        if found is None:
            raise InputError(f"{self.file.path}: tensor {name} is missing")
        return str(found.type.name).lower()

    def holds_integers(self, name: str) -> bool:
        """Whether matrix ``name`` (no ".weight") is stored as integers of any kind."""
        found = self._find(f"{name}.weight")
        return found is not None and found.type.name not in ("F32", "F16", "BF16")

    def _find(self, name: str) -> GgufTensor | None:
        stored = gguf_name(name)
        return self.file.tensors.get(stored) if stored is not None else None


def read(path: Path) -> GgufReader:
    """Open a GGUF; its header is checked and every tensor's place in the file, no weight is read.

    Raises:
        InputError: not a GGUF of this family, truncated, or anything in it that contradicts anything else.
    """
    file = read_gguf(path)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{path}: tensor token_embd.weight is missing", "not a complete model")
    factors = {field: _factors(file, file.tensors[name]) for field, name in FACTORS.items() if name in file.tensors}
    config = read_config(
        file.metadata,
        vocab_size=embedding.rows,
        tied="output.weight" not in file.tensors,
        factors=factors,
        where=str(path),
    )
    expected = config.tensor_shapes()
    for name, shape in expected.items():
        tensor = file.tensors.get(gguf_name(name) or "")
        if tensor is None:
            raise InputError(f"{path}: tensor {gguf_name(name)} is missing", "not a complete model of this family")
        if tensor.shape != shape:
            raise InputError(f"{path}: {tensor.name} is {list(tensor.shape)}, the keys say {list(shape)}")
    for name in file.tensors:
        if name not in FACTORS.values() and checkpoint_name(name) not in expected:
            raise InputError(
                f"{path}: tensor {name} is not one of this family", "another architecture, or a damaged file"
            )
    named = file.metadata.get(SCHEME)
    try:
        scheme = None if named is None else parse_scheme(str(named))
    except UsageError as error:
        raise InputError(f"{path}: {SCHEME} is {named!r}, not a scheme") from error
    return GgufReader(file, config, scheme, _exceptions(file))


def _exceptions(file: GgufFile) -> dict[str, Scheme]:
    stored = file.metadata.get(f"phi4edge.{EXCEPTIONS}")
    if stored is None:
        return {}
    try:
        return {linear: parse_scheme(name) for linear, name in json.loads(str(stored)).items()}
    except (json.JSONDecodeError, AttributeError, TypeError, UsageError) as error:
        raise InputError(f"{file.path}: phi4edge.{EXCEPTIONS} is not a table of schemes ({error})") from error


def _factors(file: GgufFile, tensor: GgufTensor) -> list[float]:
    """Longrope's factors."""
    if tensor.type != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise InputError(f"{file.path}: {tensor.name} is {tensor.type.name} {list(tensor.shape)}, expected an F32 list")
    factors: list[float] = read_rows(tensor).view(torch.float32)[0].tolist()
    return factors
