"""What every Hugging Face folder needs beside its codes: the other tensors, side files and a model card."""

from __future__ import annotations

__all__ = ["check_output", "copy_side_files", "model_card", "stored_pieces"]

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from phi4edge.checkpoint.index import TensorRef
from phi4edge.checkpoint.reader import read_tensor, stored_dtype
from phi4edge.core.disk import require_space
from phi4edge.core.errors import InputError
from phi4edge.core.modelcard import UNMEASURED
from phi4edge.model.source import QuantizedModel
from phi4edge.writers._safetensors import Piece

_PIECE_BYTES = 16 * 2**20
_LEGAL = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_output(model: QuantizedModel, out: Path, nbytes: int) -> None:
    """Refuse a place that would overwrite the base model, or where ``nbytes`` do not fit.

    Raises:
        InputError: it would overwrite.
        TargetError: it is too small.
    """
    source, target = model.checkpoint.index.folder.resolve(), out.resolve()
    if target == source or target in source.parents:
        raise InputError(f"{out}: is, or holds, the base model's own folder", "choose another --out")
    require_space(out, nbytes, "this artifact", "free space, or choose another --out")


def copy_side_files(model: QuantizedModel, folder: Path) -> None:
    """Copy tokenizer, generation settings and licence texts; config.json is the writer's own."""
    index = model.checkpoint.index
    legal = [index.folder / name for name in _LEGAL if (index.folder / name).is_file()]
    for path in (*index.side_files, *legal):
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def stored_pieces(model: QuantizedModel, ref: TensorRef) -> Iterator[Piece]:
    """A tensor in the checkpoint's dtype, some rows at a time: the stored bytes, or what the run put in their place.

    Raises:
        InputError: a value in it that is NaN or Inf.
    """
    if not ref.shape:
        yield ref.name, read_tensor(ref)
        return
    changed = ref.name in model.replaced or (model.base is not None and ref.name in model.config.tensor_shapes())
    step = max(1, _PIECE_BYTES * ref.shape[0] // max(ref.nbytes, 1))
    for start in range(0, ref.shape[0], step):
        rows = slice(start, min(start + step, ref.shape[0]))
        piece = model.rest.tensor(ref.name, rows).to(stored_dtype(ref)) if changed else read_tensor(ref, rows)
        if piece.is_floating_point() and not all(map(math.isfinite, (piece.min(), piece.max()))):  # of NaN both are
            model.checkpoint.tensor(ref.name, rows)  # raises, naming the first bad element
            raise InputError(f"{ref.name}: a value that the run put there exceeds the checkpoint's {ref.dtype}")
        yield ref.name, piece


def model_card(
    model: QuantizedModel, format_name: str, notes: str, *, rest: str | None = None, library: str = "transformers"
) -> str:
    """README.md of an artifact: what it is, what it was made from and how, and a place for its drift.

    ``rest`` says what became of embedding, head and norms where they are not the base model's bytes.
    """
    scheme, provenance = model.scheme, model.provenance
    base = provenance.get("base_model", "")
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if _HUB_ID.fullmatch(base):
        front += [f"base_model: {json.dumps(base)}", "base_model_relation: quantized"]
    front += ["tags:", f"- {format_name}", "- phi3", f"- {scheme.bits}-bit", "- phi4edge"]
    group = "a whole row" if scheme.group_size < 0 else f"{scheme.group_size} input channels"
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    quantized = len(model.linears)
    changed = model.base is not None or bool(model.replaced)
    kept = "the base model's, changed along with them." if changed else "as in the base model."
    made = [f"| {key} | {_cell(value)} |" for key, value in provenance.items()]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {Path(base).name or model.config.family}, {scheme.name}",
            "",
            f"Weights of {model.config.family} rounded to {scheme.bits} bits, {kind}, one scale for {group} "
            f"({scheme.name}), stored in the {format_name} format. The {quantized} linears of the "
            f"{model.config.num_layers} blocks are quantized; " + (rest or f"embedding, norms and head are {kept}"),
            "",
            notes,
            "",
            "## How it was made",
            "",
            "| | |",
            "|---|---|",
            *made,
            "",
            "## Drift",
            "",
            UNMEASURED,
            "",
            "## Licence",
            "",
            "The base model's licence covers these weights too; read it on the base model's card"
            " and in the licence file of this folder, if the base model came with one.",
            "",
        ]
    )


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
