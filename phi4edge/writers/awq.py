"""AWQ checkpoint, version "gemm": a Hugging Face folder for vLLM, transformers with GPTQModel, and ONNX Runtime GenAI.

Only the layout is AWQ's (:mod:`phi4edge.quant.awq_packing`): the codes are those of the run, whatever solved them, as
they are. Embedding, norms and head keep the base model's bytes, fused projections stay fused under its names. Symmetric
runs have their zero point 8 spelled out, and ``meta.scheme`` says that they are symmetric.

Which tools want what. ONNX Runtime GenAI's builder and compressed-tensors' converter take any group size; the tests
run both. vLLM (by its source, not run) wants groups of 32, 64 or 128 or whole rows, a stored zero point, and casts
scales to the model's dtype: exact in float16 only. transformers reads the folder through GPTQModel, whose kernel on a
CPU rounds scales to bfloat16; benchmarks/formats/awq_interop.py runs it and AutoAWQ's own unpacking. mlx-lm converts
such a folder at load and rounds −s·z to float16: for MLX there is a writer of its own.
"""

from __future__ import annotations

__all__ = ["FORMAT", "SCHEMES", "matches", "read", "refusal", "write"]

from pathlib import Path

from phi4edge.checkpoint.config import load_config
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.awq_packing import FIELDS, pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.writers._api import Artifact, WriteOptions, check_held
from phi4edge.writers._awq_config import declares_awq, parse_quantization, quantization_config
from phi4edge.writers._linears import linears_refusal
from phi4edge.writers._packed_folder import (
    FolderText,
    PackedReader,
    Packing,
    head_refusal,
    open_packed,
    write_packed,
)

FORMAT = "awq"
SCHEMES = "w4g32, w4g64, w4g128, w4row, w4g32-asym, w4g64-asym, w4g128-asym, q4_0"
_PACKING = Packing(FIELDS, packed_layout, packing_refusal, pack_linear, unpack_linear)
_NOTES = (
    "The layout is AWQ's, version `gemm`; `method` below says how the codes were found. Scales are float16: load in "
    "float16 (vLLM: `--dtype float16`), because a loader that casts them to bfloat16 rounds them."
)


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become an AWQ checkpoint, or None when it can."""
    return linears_refusal(model, packing_refusal, one_scheme=True) or head_refusal(model, None, options)


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the folder ``out``; RAM is bounded by one linear.

    Raises:
        InputError: the format cannot hold the model, or the place is wrong or too small.
    """
    check_held(FORMAT, refusal(model, options), SCHEMES)
    text = FolderText({"quantization_config": quantization_config(model.scheme)}, _NOTES)
    return write_packed(model, out, options, format_name=FORMAT, packing=_PACKING, text=text)


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder that says it is an AWQ checkpoint."""
    return path.is_dir() and declares_awq(path)


def read(path: Path) -> PackedReader:
    """Open an AWQ checkpoint; headers and configuration are checked, no weight is read.

    Raises:
        InputError: not such a folder, or anything in it that contradicts anything else.
    """
    scheme, raw = parse_quantization(path, load_config(path).raw)
    return open_packed(path, _PACKING, scheme, raw)
