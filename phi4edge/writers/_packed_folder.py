"""A Hugging Face folder whose linears are packed: what GPTQ, AWQ, compressed-tensors and MLX share.

Such formats differ in how a linear is stored (:class:`Packing`) and in what config.json says of it. The rest is one
way: tensors keep the base model's names and order, whatever is not packed keeps its bytes, side files are copied, RAM
is bounded by one linear, and the folder has its name only when it is whole.
"""

from __future__ import annotations

__all__ = [
    "FolderText",
    "PackedReader",
    "Packing",
    "check_entry",
    "head_refusal",
    "open_packed",
    "open_rest",
    "q8_0_head",
    "write_packed",
]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig, load_config
from phi4edge.checkpoint.index import DTYPE_BYTES, FLOATS, CheckpointIndex, open_index
from phi4edge.checkpoint.reader import CheckpointReader, read_tensor
from phi4edge.core.atomic import atomic_directory, write_json
from phi4edge.core.errors import InputError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.ggml import BLOCK_TYPES, unpack_linear
from phi4edge.quant.ggml_rounding import quantize_q8_0
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.writers._api import Artifact, WriteOptions
from phi4edge.writers._hf_folder import check_output, copy_side_files, model_card, stored_pieces
from phi4edge.writers._safetensors import Piece, PlannedTensor, planned_bytes, write_safetensors

HEAD = "lm_head"
SHARD_BYTES = 4 * 2**30
_ROWS = 4096  # of the head in float32 at a time
_DECLARATIONS = ("quantization_config", "quantization")  # the second is MLX's

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # field → safetensors dtype and shape


@dataclass(frozen=True)
class Packing:
    """How a format stores one linear, in both directions. The first field is the one that a linear is known by."""

    fields: tuple[str, ...]  # in the order in which they are written
    layout: Callable[[Scheme, int, int], Layout]  # of a matrix [out_features, in_features]
    refusal: Callable[[Scheme, int, int], str | None]  # why such a matrix cannot be packed
    pack: Callable[[QuantizedLinear], dict[str, Tensor]]
    unpack: Callable[[str, Scheme, Mapping[str, Tensor]], QuantizedLinear]


@dataclass(frozen=True)
class FolderText:
    """What a writer says in files of its folder."""

    config: Mapping[str, Any]  # keys added to config.json
    notes: str  # paragraph of the model card
    files: Mapping[str, Any] = field(default_factory=dict)  # further JSON files by name
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})  # of the safetensors files


def head_refusal(model: QuantizedModel, packing: Packing | None, options: WriteOptions) -> str | None:
    """Why the head cannot be stored as ``options`` ask, or None when it can.

    It keeps the base model's bytes unless q8_0 is asked for, which needs a ``packing`` that can hold a head.
    """
    for role, kind in (("embedding", options.embedding), ("head", options.head)):
        if kind in (None, "f16"):
            continue
        if role == "embedding" or packing is None:
            return f"{role}: {kind} is asked for, and this format keeps the base model's {role} as it is"
        if kind != "q8_0":
            return f"head: {kind} is asked for; here it is stored as it is, or as q8_0"
        if model.config.tie_word_embeddings:
            return "head: q8_0 is asked for, and it is tied to the embedding, which this format does not quantize"
        reason = packing.refusal(parse_scheme("q8_0"), model.config.vocab_size, model.config.hidden_size)
        if reason:
            return f"head: {reason}"
    return None


def q8_0_head(model: QuantizedModel) -> QuantizedLinear:
    """The head rounded without data to the q8_0 codes that a GGUF holds; some rows of it in float32 at a time."""
    rows, columns = model.config.vocab_size, model.config.hidden_size
    scheme, block = parse_scheme("q8_0"), BLOCK_TYPES["q8_0"]
    codes, scales = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, columns // 32, dtype=torch.float16)
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        packed = quantize_q8_0(model.rest.tensor(f"{HEAD}.weight", part), HEAD)
        found = unpack_linear(HEAD, block, packed, scheme)
        codes[part], scales[part] = found.codes, found.params["scales"]
    return QuantizedLinear(HEAD, scheme, codes, {"scales": scales})


def write_packed(
    model: QuantizedModel,
    out: Path,
    options: WriteOptions,
    *,
    format_name: str,
    packing: Packing,
    text: FolderText,
    head: bool = False,
) -> Artifact:
    """Write the folder ``out``; with ``head`` the head too, in the codes of :func:`q8_0_head`.

    Raises:
        InputError: the place is wrong or too small, or a value does not fit the format.
    """
    load: dict[str, Callable[[], QuantizedLinear]] = {
        name: (lambda name=name: model.load(name))  # type: ignore[misc]  # mypy knows no defaults in lambdas
        for name in model.linears
    }
    if head:
        load[HEAD] = lambda: q8_0_head(model)
    schemes = {name: model.scheme_of(name) for name in model.linears} | ({HEAD: parse_scheme("q8_0")} if head else {})
    plan = _plan(model, packing, schemes)
    check_output(model, out, planned_bytes(plan))
    options.progress.start(f"export {format_name}", len(plan), "tensor")
    try:
        with atomic_directory(out, replace=options.force) as folder:
            write_json(folder / "config.json", {**model.config.raw, **text.config})
            for name, content in text.files.items():
                write_json(folder / name, content)
            copy_side_files(model, folder)
            (folder / "README.md").write_text(model_card(model, format_name, text.notes), encoding="utf-8")
            pieces = _pieces(model, plan, packing, load, options.progress)
            digests = write_safetensors(folder, plan, pieces, shard_bytes=SHARD_BYTES, metadata=text.metadata)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})", "nothing was left under that name") from error
    options.progress.finish()
    files = sorted(path for path in out.iterdir() if path.is_file())
    packed = model.config.linear_parameters + (model.config.vocab_size * model.config.hidden_size if head else 0)
    return Artifact(
        path=out,
        format=format_name,
        scheme=model.scheme.name,
        files={path.name: digests.get(path.name) or sha256_file(path) for path in files},
        nbytes=sum(path.stat().st_size for path in files),
        quantized_fraction=packed / model.config.parameters,
    )


def _plan(model: QuantizedModel, packing: Packing, schemes: Mapping[str, Scheme]) -> list[PlannedTensor]:
    """All tensors in model order, then whatever else the checkpoint holds, the wider types first (alignment)."""
    tensors, shapes = model.checkpoint.index.tensors, model.config.tensor_shapes()
    others = sorted(tensors.keys() - shapes.keys(), key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    plan: list[PlannedTensor] = []
    for name in (*shapes, *others):
        linear = name.removesuffix(".weight")
        if linear in schemes:
            layout = packing.layout(schemes[linear], *_matrix(shapes[name]))
            plan += [PlannedTensor(f"{linear}.{field}", *layout[field]) for field in packing.fields if field in layout]
        else:
            plan.append(PlannedTensor(name, tensors[name].dtype, tensors[name].shape))
    return plan


def _pieces(
    model: QuantizedModel,
    plan: list[PlannedTensor],
    packing: Packing,
    load: Mapping[str, Callable[[], QuantizedLinear]],
    progress: Progress,
) -> Iterator[Piece]:
    """The data of ``plan``; the tensors of a linear stand together in it."""
    index = model.checkpoint.index
    packed: dict[str, Tensor] = {}
    for tensor in plan:
        linear, _, name = tensor.name.rpartition(".")
        if linear in load and name in packing.fields:
            if not packed:
                progress.status(linear)
                packed = packing.pack(load[linear]())
            yield tensor.name, packed.pop(name)
        else:
            progress.status(tensor.name)
            yield from stored_pieces(model, index.tensors[tensor.name])
        progress.advance()


@dataclass(frozen=True)
class PackedReader:
    """Such a folder as a source of weights and of their codes; each call reads what it is asked for."""

    index: CheckpointIndex
    packing: Packing
    scheme: Scheme
    raw: Mapping[str, Any]
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)  # linears on another scheme

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        return self.index.config

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What config.json says of the quantization."""
        return self.raw

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor by checkpoint name, float32, dequantized.

        Raises:
            InputError: no such tensor, or damaged data.
        """
        linear = self.quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None:
            return CheckpointReader(self.index).tensor(name, rows)
        return linear.dequantize() if rows is None else linear.rows(*_range(rows, linear.out_features)).dequantize()

    def quantized(self, name: str) -> QuantizedLinear | None:
        """Codes of linear ``name`` (no ".weight"), or None where it is stored in floating point.

        Raises:
            InputError: damaged data.
        """
        if not self.holds_integers(name):
            return None
        found = [self._unpacked(part, name) for part in self.stored_under(name)]
        if len(found) == 1:
            return found[0]
        params = {field: torch.cat([part.params[field] for part in found]) for field in found[0].params}
        return QuantizedLinear(name, found[0].scheme, torch.cat([part.codes for part in found]), params)

    def _unpacked(self, part: str, name: str) -> QuantizedLinear:
        stored = {field: self.index.tensors.get(f"{part}.{field}") for field in self.packing.fields}
        tensors = {field: read_tensor(ref) for field, ref in stored.items() if ref is not None}
        return self.packing.unpack(name, self.exceptions.get(name, self.scheme), tensors)

    def holds_integers(self, name: str) -> bool:
        """Whether matrix ``name`` (no ".weight") is stored as integers of any kind."""
        return all(self._is_packed(part) for part in self.stored_under(name))

    def stored_type(self, name: str) -> str:
        """Type in which tensor ``name`` is stored: f32, f16 or bf16, or the name of its scheme."""
        linear = name.removesuffix(".weight")
        if self.holds_integers(linear):
            return self.exceptions.get(linear, self.scheme).name
        return self.index.tensors[name].dtype.lower()

    def _is_packed(self, name: str) -> bool:
        ref = self.index.tensors.get(f"{name}.{self.packing.fields[0]}")
        return ref is not None and not (self.packing.fields[0] == "weight" and ref.dtype in FLOATS)

    def stored_under(self, name: str) -> tuple[str, ...]:
        """Names under which linear ``name`` is stored: its own, or those of the parts that another tool split it in."""
        block, _, projection = name.rpartition(".")
        parts = tuple(f"{block}.{part}" for part, _ in _parts(self.config, projection))
        return parts if parts and self._is_packed(parts[0]) else (name,)


def open_packed(
    path: Path, packing: Packing, scheme: Scheme, raw: Mapping[str, Any], exceptions: Mapping[str, Scheme] | None = None
) -> PackedReader:
    """Open such a folder; headers and configuration are checked, no weight is read.

    Raises:
        InputError: a tensor that is missing, that stands there twice, or that contradicts the configuration.
    """
    config = load_config(path)
    index = open_index(path, check=False)
    reader = PackedReader(index, packing, scheme, raw, exceptions or {})
    for name, shape in config.tensor_shapes().items():
        linear = name.removesuffix(".weight")
        stored = reader.stored_under(linear)
        if stored == (linear,) and not reader.holds_integers(linear):
            check_entry(index, name, FLOATS, shape)
            continue
        if name in index.tensors and "weight" not in packing.fields:
            raise InputError(f"{path}: {linear} is stored twice, as weight and as {packing.fields[0]}")
        own = reader.exceptions.get(linear, scheme)
        rows = [shape[0]] if stored == (linear,) else [n for _, n in _parts(config, linear.rpartition(".")[2])]
        for part, out_features in zip(stored, rows, strict=True):
            reason = packing.refusal(own, out_features, shape[1])
            if reason:
                raise InputError(f"{path}: {part}: {reason}", "config.json and the weights do not belong together")
            for field_name, (dtype, expected) in packing.layout(own, out_features, shape[1]).items():
                check_entry(index, f"{part}.{field_name}", (dtype,), expected)
    return reader


def open_rest(folder: Path) -> CheckpointIndex:
    """The index of such a folder without its linears, and its configuration without what it says of them.

    It is what a run over these codes reads beside them: embedding, norms, head and tokenizer.

    Raises:
        InputError: as :func:`phi4edge.checkpoint.index.open_index`.
    """
    index = open_index(folder, check=False)
    places = tuple({f"{name.rpartition('.')[0]}." for name in index.config.linears})
    kept = {name: ref for name, ref in index.tensors.items() if not name.startswith(places)}
    raw = {key: value for key, value in index.config.raw.items() if key not in _DECLARATIONS}
    return replace(index, config=replace(index.config, raw=raw), tensors=kept)


def _parts(config: ModelConfig, projection: str) -> list[tuple[str, int]]:
    """The matrices that other tools split a fused projection in, with their rows, in its order."""
    if projection == "gate_up_proj":
        return [("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)]
    if projection == "qkv_proj":
        return [("q_proj", config.q_size), ("k_proj", config.kv_size), ("v_proj", config.kv_size)]
    return []


def check_entry(index: CheckpointIndex, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Hold a tensor's header against what is expected of it.

    Raises:
        InputError: it is missing, or of another type or shape.
    """
    ref = index.tensors.get(name)
    if ref is None:
        raise InputError(f"{index.folder}: tensor {name} is missing", "the checkpoint is incomplete")
    if ref.shape != shape or ref.dtype not in dtypes:
        raise InputError(
            f"{ref.path.name}: {name} is {ref.dtype} {list(ref.shape)}, expected {' or '.join(dtypes)} {list(shape)}",
            "config.json and the weights do not belong together",
        )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    out_features, in_features = shape
    return out_features, in_features


def _range(rows: slice, count: int) -> tuple[int, int]:
    start, stop, _ = rows.indices(count)
    return start, stop
