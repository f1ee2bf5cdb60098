"""GPTQ checkpoint: a Hugging Face folder that transformers (with GPTQModel's kernels) and ONNX Runtime GenAI load.

The codes are stored as they are (:mod:`phi4edge.quant.gptq_packing`); embedding, norms and head keep the
base model's bytes. ``desc_act`` is false and ``g_idx`` trivial. Symmetric scales may be negative: w = s·(q − z)
all the same. Fused projections stay fused under the base model's names, as both expect them; ``GPTQModel.load``
called directly splits ``gate_up_proj`` and refuses such a folder, naming the tensors that it misses.

``checkpoint_format`` is v1, ``"gptq"``, wherever v1 can hold the zero points, for every reader knows it, and ONNX
Runtime GenAI's builder takes v2 for v1 without a word. An asymmetric model with a zero point of 0 does not fit v1,
which stores z − 1; it becomes ``"gptq_v2"``, and the progress note and the model card say so.
"""

from __future__ import annotations

__all__ = ["FORMAT", "GptqReader", "matches", "read", "refusal", "write"]

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig, load_config
from phi4edge.checkpoint.index import DTYPE_BYTES, FLOATS, CheckpointIndex, open_index
from phi4edge.checkpoint.reader import CheckpointReader, read_tensor
from phi4edge.core.atomic import atomic_directory, write_json
from phi4edge.core.errors import InputError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.gptq_packing import FIELDS, pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.writers._api import Artifact, WriteOptions
from phi4edge.writers._gptq_config import (
    ZERO_OFFSET,
    GptqFormat,
    declares_gptq,
    parse_quantization,
    quantization_config,
)
from phi4edge.writers._hf_folder import check_output, copy_side_files, model_card, stored_pieces
from phi4edge.writers._safetensors import Piece, PlannedTensor, planned_bytes, write_safetensors

FORMAT = "gptq"
SHARD_BYTES = 4 * 2**30


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become a GPTQ checkpoint, or None when it can."""
    for name, (out_features, in_features) in _linear_shapes(model.config).items():
        reason = packing_refusal(model.scheme, out_features, in_features)
        if reason:
            return f"{name}: {reason}"
        if model.scheme_of(name) != model.scheme:
            return f"{name}: is {model.scheme_of(name).name}, others {model.scheme.name}; this writer holds one scheme"
        if name not in model.linears:
            return f"{name}: is not quantized, and loaders of the format expect every linear of a block to be"
    return None


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the folder ``out``; RAM is bounded by one linear.

    Raises:
        InputError: the format cannot hold the model, or the place is wrong or too small.
    """
    reason = refusal(model, options)
    if reason:
        raise InputError(
            f"gptq cannot hold this run: {reason}", "schemes that fit: w4g32, w4g128, w8g128, w4g32-asym, q4_0, q8_0"
        )
    plan = _plan(model)
    check_output(model, out, planned_bytes(plan))
    checkpoint_format = _checkpoint_format(model)
    if checkpoint_format == "gptq_v2":
        options.progress.note(f"{out.name}: checkpoint_format gptq_v2, because v1 cannot store zero points of 0")
    quantization = quantization_config(model.scheme, checkpoint_format)
    options.progress.start("export gptq", len(plan), "tensor")
    try:
        with atomic_directory(out, replace=options.force) as folder:
            write_json(folder / "config.json", {**model.config.raw, "quantization_config": quantization})
            write_json(folder / "quantize_config.json", quantization)
            copy_side_files(model, folder)
            (folder / "README.md").write_text(model_card(model, FORMAT, _NOTES[checkpoint_format]), encoding="utf-8")
            pieces = _pieces(model, plan, ZERO_OFFSET[checkpoint_format], options.progress)
            write_safetensors(folder, plan, pieces, shard_bytes=SHARD_BYTES, metadata={"format": "pt"})
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
        quantized_fraction=model.config.linear_parameters / model.config.parameters,
    )


_NOTES = {
    "gptq": "`checkpoint_format` is `gptq` (v1): `qzeros` holds the zero point less 1.",
    "gptq_v2": "`checkpoint_format` is `gptq_v2`: `qzeros` holds the zero point itself, because v1 cannot store the "
    "zero points of 0 that occur here. A reader that ignores `checkpoint_format`, such as ONNX Runtime GenAI's "
    "model builder, takes these weights for others.",
}


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config.num_layers)
        for name, shape in config.linear_shapes.items()
    }


def _plan(model: QuantizedModel) -> list[PlannedTensor]:
    """All tensors in model order, then whatever else the checkpoint holds, the wider types first (alignment)."""
    tensors, shapes = model.checkpoint.index.tensors, model.config.tensor_shapes()
    others = sorted(tensors.keys() - shapes.keys(), key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    plan: list[PlannedTensor] = []
    for name in (*shapes, *others):
        linear = name.removesuffix(".weight")
        if linear in model.linears:
            layout = packed_layout(model.scheme, *_matrix(shapes[name]))
            plan += [PlannedTensor(f"{linear}.{field}", *layout[field]) for field in FIELDS]
        else:
            plan.append(PlannedTensor(name, tensors[name].dtype, tensors[name].shape))
    return plan


def _pieces(model: QuantizedModel, plan: list[PlannedTensor], zero_offset: int, progress: Progress) -> Iterator[Piece]:
    """The data of ``plan``; the four tensors of a linear stand together in it."""
    index = model.checkpoint.index
    packed: dict[str, Tensor] = {}
    for tensor in plan:
        linear, _, field = tensor.name.rpartition(".")
        if linear in model.linears and field in FIELDS:
            if not packed:
                progress.status(linear)
                packed = pack_linear(model.load(linear), zero_offset)
            yield tensor.name, packed.pop(field)
        else:
            progress.status(tensor.name)
            yield from stored_pieces(model, index.tensors[tensor.name])
        progress.advance()


def _checkpoint_format(model: QuantizedModel) -> str:
    """v1 where it can hold every zero point; looks at all of them, up to the first 0."""
    if model.scheme.symmetric:
        return "gptq"
    fits = all(int(model.load(name).params["zeros"].min()) >= ZERO_OFFSET["gptq"] for name in model.linears)
    return "gptq" if fits else "gptq_v2"


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder that says it is a GPTQ checkpoint."""
    return path.is_dir() and declares_gptq(path)


@dataclass(frozen=True)
class GptqReader:
    """A GPTQ checkpoint as a source of weights and of their codes; each call reads what it is asked for."""

    index: CheckpointIndex
    format: GptqFormat

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        return self.index.config

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The quantization_config."""
        return self.format.raw

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor by checkpoint name, float32, dequantized.

        Raises:
            InputError: no such tensor, or damaged data.
        """
        linear = self.quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is None:
            return CheckpointReader(self.index).tensor(name, rows)
        weight = linear.dequantize()
        return weight if rows is None else weight[rows]

    def quantized(self, name: str) -> QuantizedLinear | None:
        """Codes of linear ``name`` (no ".weight"), or None where it is stored in floating point.

        Raises:
            InputError: damaged data.
        """
        if f"{name}.qweight" not in self.index.tensors:
            return None
        tensors = {field: read_tensor(self.index.tensors[f"{name}.{field}"]) for field in FIELDS}
        return unpack_linear(name, self.format.scheme, tensors, self.format.zero_offset)

    def holds_integers(self, name: str) -> bool:
        """Whether matrix ``name`` (no ".weight") is stored as integers of any kind."""
        return f"{name}.qweight" in self.index.tensors


def read(path: Path) -> GptqReader:
    """Open a GPTQ checkpoint; headers and configuration are checked, no weight is read.

    Raises:
        InputError: not such a folder, or anything in it that contradicts anything else.
    """
    config = load_config(path)
    declared = parse_quantization(path, config.raw)
    index = open_index(path, check=False)
    for name, shape in config.tensor_shapes().items():
        linear = name.removesuffix(".weight")
        if f"{linear}.qweight" not in index.tensors:
            _check_entry(index, name, FLOATS, shape)
            continue
        if name in index.tensors:
            raise InputError(f"{path}: {linear} is stored twice, as weight and as qweight")
        reason = packing_refusal(declared.scheme, *_matrix(shape))
        if reason:
            raise InputError(f"{path}: {linear}: {reason}", "config.json and the weights do not belong together")
        for field, (dtype, expected) in packed_layout(declared.scheme, *_matrix(shape)).items():
            _check_entry(index, f"{linear}.{field}", (dtype,), expected)
    return GptqReader(index, declared)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    out_features, in_features = shape
    return out_features, in_features


def _check_entry(index: CheckpointIndex, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    ref = index.tensors.get(name)
    if ref is None:
        raise InputError(f"{index.folder}: tensor {name} is missing", "the checkpoint is incomplete")
    if ref.shape != shape or ref.dtype not in dtypes:
        raise InputError(
            f"{ref.path.name}: {name} is {ref.dtype} {list(ref.shape)}, expected {' or '.join(dtypes)} {list(shape)}",
            "config.json and the weights do not belong together",
        )
