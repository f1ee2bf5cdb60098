"""GPTQ checkpoint: a Hugging Face folder that transformers (with GPTQModel's kernels) and ONNX Runtime GenAI load.

The codes are stored as they are (:mod:`phi4edge.quant.gptq_packing`); embedding, norms and head keep the
base model's bytes, and with ``--head q8_0`` an untied head has the 8-bit codes that a GGUF holds, announced in
``dynamic``. ``desc_act`` is false and ``g_idx`` trivial. Symmetric scales may be negative: w = s·(q − z)
all the same. Fused projections stay fused under the base model's names, as both expect them; ``GPTQModel.load``
called directly splits ``gate_up_proj`` and refuses such a folder, naming the tensors that it misses.

``checkpoint_format`` is v1, ``"gptq"``, wherever v1 can hold the zero points, for every reader knows it, and ONNX
Runtime GenAI's builder takes v2 for v1 without a word. An asymmetric model with a zero point of 0 does not fit v1,
which stores z − 1; it becomes ``"gptq_v2"``, and the progress note and the model card say so.
"""

from __future__ import annotations

__all__ = ["FORMAT", "SCHEMES", "matches", "read", "refusal", "write"]

from functools import partial
from pathlib import Path

from phi4edge.checkpoint.config import load_config
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.gptq_packing import FIELDS, pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.writers._api import Artifact, WriteOptions, check_held
from phi4edge.writers._gptq_config import (
    QUANTIZE_CONFIG,
    ZERO_OFFSET,
    declares_gptq,
    parse_quantization,
    quantization_config,
)
from phi4edge.writers._linears import linears_refusal
from phi4edge.writers._packed_folder import (
    FolderText,
    PackedReader,
    Packing,
    head_refusal,
    open_packed,
    write_packed,
)

FORMAT = "gptq"
SCHEMES = "w4g32, w4g128, w8g128, w4g32-asym, q4_0, q8_0"
_NOTES = {
    "gptq": "`checkpoint_format` is `gptq` (v1): `qzeros` holds the zero point less 1.",
    "gptq_v2": "`checkpoint_format` is `gptq_v2`: `qzeros` holds the zero point itself, because v1 cannot store the "
    "zero points of 0 that occur here. A reader that ignores `checkpoint_format`, such as ONNX Runtime GenAI's "
    "model builder, takes these weights for others.",
}
_HALF = "Scales are float16: load in float16, because a loader that casts them to bfloat16 rounds them."


def _packing(checkpoint_format: str) -> Packing:
    offset = ZERO_OFFSET[checkpoint_format]
    return Packing(
        FIELDS,
        packed_layout,
        packing_refusal,
        partial(pack_linear, zero_offset=offset),
        partial(unpack_linear, zero_offset=offset),
    )


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become a GPTQ checkpoint, or None when it can."""
    packing = _packing("gptq")
    return linears_refusal(model, packing_refusal, one_scheme=True) or head_refusal(model, packing, options)


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the folder ``out``; RAM is bounded by one linear, or by the head's codes.

    Raises:
        InputError: the format cannot hold the model, or the place is wrong or too small.
    """
    check_held(FORMAT, refusal(model, options), SCHEMES)
    checkpoint_format = _checkpoint_format(model)
    if checkpoint_format == "gptq_v2":
        options.progress.note(f"{out.name}: checkpoint_format gptq_v2, because v1 cannot store zero points of 0")
    head = options.head == "q8_0"
    quantization = quantization_config(model.scheme, checkpoint_format, head=head)
    notes = f"{_NOTES[checkpoint_format]} {_HALF}"
    text = FolderText({"quantization_config": quantization}, notes, {QUANTIZE_CONFIG: quantization})
    packing = _packing(checkpoint_format)
    return write_packed(model, out, options, format_name=FORMAT, packing=packing, text=text, head=head)


def _checkpoint_format(model: QuantizedModel) -> str:
    """v1 where it can hold every zero point; looks at all of them, up to the first 0."""
    if model.scheme.symmetric:
        return "gptq"
    fits = all(int(model.load(name).params["zeros"].min()) >= ZERO_OFFSET["gptq"] for name in model.linears)
    return "gptq" if fits else "gptq_v2"


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder that says it is a GPTQ checkpoint."""
    return path.is_dir() and declares_gptq(path)


def read(path: Path) -> PackedReader:
    """Open a GPTQ checkpoint; headers and configuration are checked, no weight is read.

    Raises:
        InputError: not such a folder, or anything in it that contradicts anything else.
    """
    declared = parse_quantization(path, load_config(path).raw)
    return open_packed(path, _packing(declared.checkpoint_format), declared.scheme, declared.raw, declared.exceptions)
