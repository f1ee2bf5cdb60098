"""A folder for ONNX Runtime GenAI: an ONNX graph of Phi3ForCausalLM whose MatMulNBits nodes hold the codes as they are.

The graph is written directly (:mod:`phi4edge.writers._onnx_graph`), the weights stream into its data file with one
linear in RAM (:mod:`phi4edge.quant.matmulnbits_packing` knows the bits). GenAI's own builder would hold the model in
RAM twice over, and rounds a head that it was not told to leave alone.

Activations, KV cache and scales are float32, for the CPU; its kernels round inputs of MatMulNBits to int8 where
``accuracy_level`` is 4, as it is unless asked otherwise (without it decoding took 2.3 times as long), and leave them
alone where it is 1. gate_up_proj becomes two nodes, as GenAI's builder has them. Head and embedding are tables of 8
bits with the very codes that a GGUF's q8_0 has, or float16. GatherBlockQuantized widens only the rows that are looked
up, so the embedding costs no more RAM than its file: a float32 one of Phi-4-mini would be 2.5 GB. A tied pair is stored
once.
"""

from __future__ import annotations

__all__ = ["FORMAT", "OnnxReader", "matches", "read", "refusal", "write"]

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
from phi4edge.core.atomic import atomic_directory, write_json
from phi4edge.core.errors import InputError, MissingToolError, UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.matmulnbits_packing import packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme, parse_scheme
from phi4edge.writers._api import Artifact, WriteOptions
from phi4edge.writers._hf_folder import check_output, copy_side_files, model_card
from phi4edge.writers._onnx_config import (
    CONFIG,
    EXCEPTIONS,
    GENAI_CONFIG,
    SCHEME,
    default_context,
    genai_config,
    properties,
)
from phi4edge.writers._onnx_file import INSTALL, OnnxFile, missing_package, read_onnx
from phi4edge.writers._onnx_graph import build_model
from phi4edge.writers._onnx_names import DATA, EMBEDDING, HEAD, MODEL, norm_name, part_name, parts
from phi4edge.writers._onnx_tensors import place, plan_units, table_names, write_units

FORMAT = "onnx"
_TABLES = ("q8_0", "f16")
_CACHE_STEP = 8  # channel pairs that GroupQueryAttention's kernel turns at a time


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become such a folder, or None when it can."""
    config = model.config
    reason = _model_refusal(config, options.tables(model))
    if reason:
        return reason
    for name, shape in config.tensor_shapes().items():
        linear = name.removesuffix(".weight")
        if ".layers." not in name or len(shape) == 1:
            continue
        if linear not in model.linears:
            return f"{linear}: is not quantized, and this writer stores every linear of a block from codes"
        reason = packing_refusal(model.scheme_of(linear), shape[1])
        if reason:
            return f"{linear}: {reason}"
    return None


def _model_refusal(config: ModelConfig, tables: Mapping[str, str]) -> str | None:
    """What speaks against the model, or against the types of its head and embedding."""
    if config.rope.dim // 2 % _CACHE_STEP:
        return (
            f"rotates {config.rope.dim // 2} pairs of channels a head, and ONNX Runtime's GroupQueryAttention "
            f"wants a multiple of {_CACHE_STEP}"
        )
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        return f"its sliding window of {config.sliding_window} tokens is shorter than its context; not written here"
    for role, kind in tables.items():
        if kind not in _TABLES:
            return f"{role}: type {kind!r}; this writer has {', '.join(_TABLES)} (--{role} q8_0)"
        if kind == "q8_0" and config.hidden_size % GGML_SCHEMES[kind].group_size:
            return f"{role}: hidden_size {config.hidden_size} is not a multiple of 32, a q8_0 block; f16 has no blocks"
    return None


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the folder ``out``; RAM is bounded by one linear.

    Raises:
        InputError: the format cannot hold the model, or the place is wrong or too small.
        UsageError: an accuracy level that MatMulNBits does not have.
        MissingToolError: the onnx package is not installed.
    """
    reason = refusal(model, options)
    if reason:
        raise InputError(
            f"onnx cannot hold this run: {reason}",
            "schemes that fit: w4g32, w4g64, w4g128, w8g32, w4g32-asym, w8g128-asym, q4_0, q8_0",
        )
    if options.accuracy_level not in (1, 4):
        raise UsageError(
            f"accuracy_level {options.accuracy_level} is neither 1 nor 4",
            "4 rounds activations to int8 and is the fast one, 1 keeps them in float32",
        )
    missing = missing_package()
    if missing:
        raise MissingToolError(missing, INSTALL)
    config, tables = model.config, options.tables(model)
    context = options.context or default_context(config)
    if context > config.context_length:
        raise InputError(
            f"context {context} is more than the {config.context_length} tokens the model was made for",
            f"give at most --context {config.context_length}",
        )
    units = plan_units(model, tables)
    places, nbytes = place(units)
    schemes = {linear: model.scheme_of(linear) for linear in model.linears}
    metadata = properties(model, tables, options.accuracy_level)
    graph = build_model(config, schemes, tables, places, options.accuracy_level, metadata).SerializeToString()
    check_output(model, out, nbytes + len(graph))
    settings = genai_config(model.checkpoint.index.folder, config, context)
    options.progress.start("export onnx", len(units), "tensor")
    try:
        with atomic_directory(out, replace=options.force) as folder:
            (folder / MODEL).write_bytes(graph)
            write_json(folder / GENAI_CONFIG, settings)
            copy_side_files(model, folder)
            card = model_card(
                model, FORMAT, _notes(options.accuracy_level, context), rest=_rest(config, tables), library=_LIBRARY
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            with (folder / DATA).open("wb") as file:
                write_units(file, units, places, options.progress)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})", "nothing was left under that name") from error
    options.progress.finish()
    files = sorted(path for path in out.iterdir() if path.is_file())
    return Artifact(
        path=out,
        format=FORMAT,
        scheme=model.scheme.name,
        files={path.name: sha256_file(path) for path in files},
        nbytes=sum(path.stat().st_size for path in files),
        quantized_fraction=(config.linear_parameters + _table_integers(config, tables)) / config.parameters,
    )


_LIBRARY = "onnxruntime-genai"


def _notes(accuracy_level: int, context: int) -> str:
    rounding = "rounded to int8 in blocks as wide as the weights'" if accuracy_level == 4 else "left in float32"
    return (
        f"For ONNX Runtime GenAI on a CPU. Inputs of MatMulNBits are {rounding} (`accuracy_level` {accuracy_level}). "
        f"`search.max_length` in genai_config.json is {context}: GenAI allocates the KV cache, float32, for that many "
        "tokens when it begins; raise or lower it there."
    )


def _rest(config: ModelConfig, tables: Mapping[str, str]) -> str:
    names = {"q8_0": "rounded to 8 bits in blocks of 32", "f16": "stored in float16"}
    if config.tie_word_embeddings:
        return f"embedding and head are one table, {names[tables['head']]}; norms are float32."
    embedding, head = (f"the {role} is {names[tables[role]]}" for role in ("embedding", "head"))
    return f"{embedding}, {head}; norms are float32."


def _table_integers(config: ModelConfig, tables: Mapping[str, str]) -> int:
    """Parameters of head and embedding that are stored as integer codes."""
    roles = ("head",) if config.tie_word_embeddings else ("head", "embedding")
    return sum(config.vocab_size * config.hidden_size for role in roles if tables[role] == "q8_0")


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
        return read_tensor(self._ref(*table_names(role, "f16"), "F16", shape), rows).float()

    def quantized(self, name: str) -> QuantizedLinear | None:
        """Codes of linear ``name`` (no ".weight"), or None where it is stored in floating point.

        Raises:
            InputError: damaged data.
        """
        if not self.holds_integers(name):
            return None
        return self._linear(name) if ".layers." in name else self._table(self._role(name), None)

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
                f"{self.file.folder / MODEL}: {name} is {ref.dtype} {list(ref.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
        return ref

    def check(self) -> None:
        """Hold every node and every weight's place against the configuration.

        Raises:
            InputError: the first that is missing or contradicts it.
        """
        config = self.config
        for name, shape in config.tensor_shapes().items():
            if len(shape) == 1:
                self._ref(norm_name(name, config), "F32", shape)
            elif ".layers." in name:
                self._check_linear(name.removesuffix(".weight"), *shape)
            elif self.holds_integers(name.removesuffix(".weight")):
                layout = packed_layout(GGML_SCHEMES["q8_0"], *shape)
                stored = table_names(self._role(name.removesuffix(".weight")), "q8_0")
                for tensor, form in zip(stored, layout.values(), strict=True):
                    self._ref(tensor, *form)
            else:
                self._ref(*table_names(self._role(name.removesuffix(".weight")), "f16"), "F16", shape)

    def _check_linear(self, linear: str, out_features: int, in_features: int) -> None:
        scheme, where = self.scheme_of(linear), self.file.folder / MODEL
        reason = packing_refusal(scheme, in_features)
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
    except ValueError as error:
        raise InputError(f"{where}: its metadata is not JSON ({error})", "the file is damaged") from error
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error
    reader = OnnxReader(file, config, scheme, exceptions)
    reader.check()
    return reader


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{text[:40]!r} is no object")
    return found
