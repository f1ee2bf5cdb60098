"""Reads a folder for ONNX Runtime GenAI back: its codes, its weights and the model's configuration."""

from __future__ import annotations

__all__ = ["OnnxReader", "matches", "read"]

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig, parse_config
from phi4edge.checkpoint.index import TensorRef
from phi4edge.checkpoint.reader import read_tensor
from phi4edge.core.errors import InputError, UsageError
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.matmulnbits_packing import packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme, parse_scheme
from phi4edge.writers._onnx_config import EXCEPTIONS, SCHEME
from phi4edge.writers._onnx_file import OnnxFile, read_onnx
from phi4edge.writers._onnx_names import CONFIG, EMBEDDING, GENAI_CONFIG, HEAD, MODEL, norm_name, part_name, parts
from phi4edge.writers._onnx_tensors import table_names


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder for ONNX Runtime GenAI, ours or another's."""
    return path.is_dir() and (path / GENAI_CONFIG).is_file()


@dataclass(frozen=True)
class OnnxReader:
    """Such a folder as a source of weights and of their codes; each call reads what it is asked for."""

    file: OnnxFile
    config: ModelConfig
    scheme: Scheme  # of every linear of the blocks that the exceptions do not name
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The graph's metadata."""
        return self.file.metadata

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor by checkpoint name, float32, dequantized.

        Raises:
            InputError: no such tensor, or damaged data.
        """
        shape = self.config.tensor_shapes().get(name)
        if shape is None:
            raise InputError(f"{self.file.folder}: tensor {name} is missing")
        if len(shape) == 1:
            values = read_tensor(self._ref(norm_name(name, self.config), "F32", shape)).float()
            return values if rows is None else values[rows]
        linear = name.removesuffix(".weight")
        if ".layers." in name:
            weight = self._linear(linear).dequantize()
            return weight if rows is None else weight[rows]
        role = self._role(linear)
        if self.holds_integers(linear):
            return self._table(role, rows).dequantize()
        return read_tensor(self._ref(table_names(role, "f16")[0], "F16", shape), rows).float()

    def quantized(self, name: str) -> QuantizedLinear | None:
        """Codes of linear ``name`` (no ".weight"), or None where it is stored in floating point.

        Raises:
            InputError: damaged data.
        """
        if not self.holds_integers(name):
            return None
        return self._linear(name) if ".layers." in name else self._table(self._role(name), None)

    def stored_type(self, name: str) -> str:
        """Type in which tensor ``name`` is stored: f32 or f16, or the name of its scheme."""
        linear = name.removesuffix(".weight")
        if ".layers." in name and self.holds_integers(linear):
            return self.scheme_of(linear).name
        if self.holds_integers(linear):
            return "q8_0"
        return "f32" if len(self.config.tensor_shapes()[name]) == 1 else "f16"

    def holds_integers(self, name: str) -> bool:
        """Whether matrix ``name`` (no ".weight") is stored as integers of any kind."""
        shape = self.config.tensor_shapes().get(f"{name}.weight", ())
        if len(shape) != 2:
            return False
        return ".layers." in name or table_names(self._role(name), "q8_0")[0] in self.file.tensors

    def _role(self, name: str) -> str:
        return HEAD if self.config.tie_word_embeddings else {"lm_head": HEAD, "model.embed_tokens": EMBEDDING}[name]

    def scheme_of(self, linear: str) -> Scheme:
        """The scheme of one linear."""
        return self.exceptions.get(linear, self.scheme)

    def _linear(self, linear: str) -> QuantizedLinear:
        scheme = self.scheme_of(linear)
        out_features, in_features = self.config.tensor_shapes()[f"{linear}.weight"]
        found: dict[str, list[Tensor]] = {}
        for part, start, stop in parts(linear, out_features):
            for name, ref in self._part_refs(part, scheme, stop - start, in_features).items():
                found.setdefault(name, []).append(read_tensor(ref))
        return unpack_linear(linear, scheme, {name: _joined(tensors) for name, tensors in found.items()})

    def _part_refs(self, part: str, scheme: Scheme, rows: int, columns: int) -> dict[str, TensorRef]:
        return {
            field: self._ref(part_name(part, field), *form)
            for field, form in packed_layout(scheme, rows, columns).items()
        }

    def _table(self, role: str, rows: slice | None) -> QuantizedLinear:
        """Rows of a table; of its scales, which are stored flat, as many as belong to them."""
        scheme, shape = GGML_SCHEMES["q8_0"], (self.config.vocab_size, self.config.hidden_size)
        layout = packed_layout(scheme, *shape)
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        groups = layout["qweight"][1][1]
        cut = {"qweight": slice(start, stop), "scales": slice(start * groups, stop * groups)}
        refs = {f: self._ref(name, *layout[f]) for f, name in zip(layout, table_names(role, "q8_0"), strict=True)}
        name = "lm_head" if role == HEAD else "model.embed_tokens"
        return unpack_linear(name, scheme, {f: read_tensor(ref, cut[f]) for f, ref in refs.items()})

    def _ref(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
        ref = self.file.tensors.get(name)
        if ref is None:
            raise InputError(f"{self.file.folder / MODEL}: has no {name}", "it was not written by phi4edge")
        if (ref.dtype, ref.shape) != (dtype, shape):
            raise InputError(
                f"{self.file.folder / MODEL}: {name} is {ref.dtype} {list(ref.shape)}, expected {dtype} {list(shape)}"
            )
        return ref

    def check(self) -> None:
        """Hold every node and every weight's place against the configuration.

        Raises:
            InputError: the first that is missing or contradicts it.
        """
        config = self.config
        for name, shape in config.tensor_shapes().items():
            linear = name.removesuffix(".weight")
            if len(shape) == 1:
                self._ref(norm_name(name, config), "F32", shape)
            elif ".layers." in name:
                self._check_linear(linear, *shape)
            elif self.holds_integers(linear):
                forms = packed_layout(GGML_SCHEMES["q8_0"], *shape).values()
                for tensor, form in zip(table_names(self._role(linear), "q8_0"), forms, strict=True):
                    self._ref(tensor, *form)
            else:
                self._ref(table_names(self._role(linear), "f16")[0], "F16", shape)

    def _check_linear(self, linear: str, out_features: int, in_features: int) -> None:
        scheme, where = self.scheme_of(linear), self.file.folder / MODEL
        reason = packing_refusal(scheme, out_features, in_features)
        if reason:
            raise InputError(f"{where}: {linear}: {reason}")
        block = scheme.group_size if scheme.group_size > 0 else in_features
        for part, start, stop in parts(linear, out_features):
            refs = self._part_refs(part, scheme, stop - start, in_features)
            says = self.file.attributes.get(refs["qweight"].name, {})
            expected = {"K": in_features, "N": stop - start, "bits": scheme.bits, "block_size": block}
            for key, value in expected.items():
                if says.get(key) != value:
                    raise InputError(f"{where}: {part}: {key} is {says.get(key)}, {scheme.name} has {value}")


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def read(path: Path) -> OnnxReader:
    """Open a folder that this writer wrote; graph and configuration are checked, no weight is read.

    Raises:
        InputError: not such a folder, another's, or anything in it that contradicts anything else.
        MissingToolError: the onnx package is not installed.
    """
    file = read_onnx(path)
    where = f"{path / MODEL}"
    if CONFIG not in file.metadata or SCHEME not in file.metadata:
        raise InputError(
            f"{where}: was not written by phi4edge, so there are no codes to read back",
            "drift and bench run it in onnxruntime_genai all the same",
        )
    try:
        config = parse_config(_object(file.metadata[CONFIG]), f"{where}: {CONFIG}")
        scheme = parse_scheme(file.metadata[SCHEME])
        others = _object(file.metadata.get(EXCEPTIONS, "{}"))
        exceptions = {linear: parse_scheme(str(name)) for linear, name in others.items()}
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: its metadata is not JSON ({error})", "the file is damaged") from error
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error
    reader = OnnxReader(file, config, scheme, exceptions)
    reader.check()
    return reader


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise json.JSONDecodeError("not an object", text, 0)
    return found
