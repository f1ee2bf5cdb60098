"""MLX folder, which mlx-lm loads on Apple silicon: codes, scales and biases as they are, never rounded again.

:mod:`phi4edge.quant.mlx_packing` says how. Embedding and norms keep the base model's bytes; with ``--head q8_0`` an
untied head has the 8-bit codes that a GGUF holds. Linears may be on different schemes, as a mix has them: each that
differs from the first has an entry of its own in ``quantization``.

What to know about mlx-lm 0.32:

- **Longrope**: its phi3 turns all positions by the long factors, transformers and llama.cpp those of a context within
  the original one by the short ones. So Phi-4-mini computes something else there in MLX below 4096 tokens, whoever
  quantized it. With ``long_factor`` replaced by ``short_factor`` in config.json it agrees below, and not beyond.
- **dtypes**: float16 scales times bfloat16 activations promote to float32 in MLX, so a bfloat16 base model computes in
  float32: as exact as can be, and slower than in 16 bits. Its own converter casts such a folder to float16.

Everything here was run with MLX on Linux, on a CPU; speed on a Mac was not measured.
"""

from __future__ import annotations

__all__ = ["FORMAT", "SCHEMES", "matches", "read", "refusal", "write"]

from pathlib import Path

from phi4edge.checkpoint.config import load_config
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.mlx_packing import FIELDS, pack_linear, packed_layout, packing_refusal, unpack_linear
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.writers._api import Artifact, WriteOptions, check_held
from phi4edge.writers._linears import linears_refusal
from phi4edge.writers._mlx_config import HEAD, architecture_refusal, declares_mlx, mlx_config, parse_quantization
from phi4edge.writers._packed_folder import (
    FolderText,
    PackedReader,
    Packing,
    head_refusal,
    open_packed,
    write_packed,
)

FORMAT = "mlx"
SCHEMES = "w4g32, w4g64, w4g128, w8g64, w4g64-asym, q4_0, q4_1, q5_0, q5_1, q8_0"
_PACKING = Packing(FIELDS, packed_layout, packing_refusal, pack_linear, unpack_linear)
_NOTES = (
    "For `mlx_lm`, mode `affine`; scales and biases are {dtype}. Checked with MLX on a Linux CPU; "
    "**not measured on hardware**: no Mac has run it for us. Where the base model is bfloat16, MLX computes these "
    "weights in float32; `python -m mlx_lm convert --hf-path … --dtype float16` makes a folder that computes in "
    "float16."
)
_LONGROPE = (
    " mlx-lm (0.32) turns all positions by longrope's `long_factor`, where the model was made for `short_factor` in "
    "contexts of up to {original} tokens: shorter ones drift. For them alone, put the `short_factor` list in the place "
    "of `long_factor` in config.json."
)


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become an MLX folder, or None when it can."""
    return (
        linears_refusal(model, packing_refusal, one_scheme=False)
        or architecture_refusal(model.config)
        or head_refusal(model, _PACKING, options)
    )


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the folder ``out``; RAM is bounded by one linear, or by the head's codes.

    Raises:
        InputError: the format cannot hold the model, or the place is wrong or too small.
    """
    check_held(FORMAT, refusal(model, options), SCHEMES)
    head = options.head == "q8_0"
    exceptions: dict[str, Scheme] = {name: model.scheme_of(name) for name in model.linears}
    if head:
        exceptions[HEAD] = parse_scheme("q8_0")
    text = FolderText(mlx_config(model.config, model.scheme, exceptions), _notes(model), metadata={"format": "mlx"})
    return write_packed(model, out, options, format_name=FORMAT, packing=_PACKING, text=text, head=head)


def _notes(model: QuantizedModel) -> str:
    zeros = any(
        model.scheme_of(name).grid == "affine" and not model.scheme_of(name).symmetric for name in model.linears
    )
    rope = model.config.rope
    longrope = _LONGROPE.format(original=rope.original_context) if rope.is_longrope else ""
    dtype = "float32, in which −s·z is exact" if zeros else "float16"
    return _NOTES.format(dtype=dtype) + longrope


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder that says it is MLX's."""
    return path.is_dir() and declares_mlx(path)


def read(path: Path) -> PackedReader:
    """Open an MLX folder of phi4edge's; headers and configuration are checked, no weight is read.

    Raises:
        InputError: not such a folder, or anything in it that contradicts anything else.
    """
    scheme, exceptions, raw = parse_quantization(path, load_config(path).raw)
    return open_packed(path, _PACKING, scheme, raw, exceptions)
