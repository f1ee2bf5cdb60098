"""compressed-tensors folder, "pack-quantized": what vLLM serves, and transformers loads with that package.

The codes are stored as they are (:mod:`phi4edge.quant.compressed_packing`), 4 or 8 bits, a scale for a group or for a
whole row; embedding, norms and head keep the base model's bytes, fused projections stay fused under its names. The
head is on the ``ignore`` list.

The package dequantizes in the dtype of the scales it has in memory: exact when loaded in float32, rounded to float16 in
float16, and in bfloat16 the scales themselves are rounded first (0.4 % at most, each). vLLM, by its source, holds
scales in the model's dtype too, hence ``--dtype float16`` in the model card; it was not run here.
"""

from __future__ import annotations

__all__ = ["FORMAT", "SCHEMES", "matches", "read", "refusal", "write"]

from pathlib import Path

from phi4edge.checkpoint.config import load_config
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.compressed_packing import FIELDS, pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.writers._api import Artifact, WriteOptions, check_held
from phi4edge.writers._compressed_config import declares_compressed, parse_quantization, quantization_config
from phi4edge.writers._linears import linears_refusal
from phi4edge.writers._packed_folder import (
    FolderText,
    PackedReader,
    Packing,
    head_refusal,
    open_packed,
    write_packed,
)

FORMAT = "compressed_tensors"
SCHEMES = "w4g32, w4g128, w4row, w8g128, w8row, w4g32-asym, w8g32-asym, q4_0, q8_0"
_PACKING = Packing(FIELDS, packed_layout, packing_refusal, pack_linear, unpack_linear)
_NOTES = (
    "The layout is compressed-tensors' `pack-quantized`. Scales are float16: load in float16 (vLLM: "
    "`--dtype float16`), because a loader that casts them to bfloat16 rounds them. Not measured in vLLM."
)
_ASYMMETRIC = (
    " In transformers pass `quantization_config=CompressedTensorsConfig(dequantize=True)`: without it, 5.23 expects"
    " zero points that are not packed and refuses these."
)


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become such a folder, or None when it can."""
    return linears_refusal(model, packing_refusal, one_scheme=True) or head_refusal(model, None, options)


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the folder ``out``; RAM is bounded by one linear.

    Raises:
        InputError: the format cannot hold the model, or the place is wrong or too small.
    """
    check_held(FORMAT, refusal(model, options), SCHEMES)
    notes = _NOTES if model.scheme.symmetric else _NOTES + _ASYMMETRIC
    text = FolderText({"quantization_config": quantization_config(model.scheme)}, notes)
    return write_packed(model, out, options, format_name=FORMAT, packing=_PACKING, text=text)


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder that says it is of compressed-tensors."""
    return path.is_dir() and declares_compressed(path)


def read(path: Path) -> PackedReader:
    """Open such a folder; headers and configuration are checked, no weight is read.

    Raises:
        InputError: not such a folder, or anything in it that contradicts anything else.
    """
    scheme, raw = parse_quantization(path, load_config(path).raw)
    return open_packed(path, _PACKING, scheme, raw)
