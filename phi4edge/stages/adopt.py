"""Adopt: the codes of a checkpoint that another tool quantized become a run, as they are, for every writer to take.

Nothing is solved and no value changes; a property of the checkpoint that the run cannot keep (channels in activation
order, a packed head) is refused by name. Embedding, norms and head are read from the same folder by later stages.
Blocks are committed one by one, as when they are solved.
"""

from __future__ import annotations

__all__ = ["adopt", "declares_codes", "plan_adoption"]

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from phi4edge.checkpoint.hub import resolve_model
from phi4edge.core.atomic import write_bytes, write_json
from phi4edge.core.errors import InputError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_file, sha256_json
from phi4edge.core.jsonfile import read_object
from phi4edge.core.memory import peak_rss_bytes
from phi4edge.core.workdir import Workdir
from phi4edge.model.block import LINEARS
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.stages.export import writer_of
from phi4edge.stages.inputs import check_tokenizer, hash_checkpoint, note_location, open_inputs
from phi4edge.stages.quantize import QuantizeSummary, finished_manifest, intact_blocks
from phi4edge.stages.run_reader import ADOPTED, MANIFEST, PERFORMANCE, block_file, read_json
from phi4edge.stages.tuning_state import total_cost
from phi4edge.writers._packed_folder import PackedReader, open_rest


def declares_codes(model: str | Path) -> bool:
    """Whether ``model`` is a local folder whose config.json says that its linears are quantized already."""
    config = Path(model) / "config.json"
    return config.is_file() and read_object(config).get("quantization_config") is not None


def adopt(model: str | Path, out: Path, *, restart: bool = False, progress: Progress = SILENT) -> QuantizeSummary:
    """Take over the codes of every linear of ``model`` into run directory ``out``.

    Raises:
        InputError: not a quantized checkpoint that is read here, or one whose codes a run cannot keep.
        ResumeError: ``out`` was begun with other inputs.
    """
    format_name, reader = _open(model)
    rest = open_rest(reader.index.folder)
    config, scheme = reader.config, reader.scheme
    hashes = hash_checkpoint(rest, out)
    codes = {path.name: sha256_file(path) for path in reader.index.shards if path.name not in hashes}
    inputs = {"kind": "adopt", "format": format_name, "scheme": scheme.name, "codes": codes}
    inputs |= open_inputs(None, None, hashes)
    with Workdir.open(out, inputs, restart=restart) as work:
        note_location(rest, out, hashes)
        manifest = finished_manifest(work, config.num_layers)
        if manifest is None:
            done = intact_blocks(work)
            progress.start("adopt", config.num_layers, "block", done)
            for layer in range(done, config.num_layers):
                began = time.monotonic()
                tensors: dict[str, Tensor] = {}
                for linear in _linears(reader, layer):
                    tensors |= linear.to_tensors()
                write_bytes(work.path / block_file(layer), save(tensors))
                spent = {"seconds": time.monotonic() - began, "peak_rss_bytes": peak_rss_bytes()}
                work.commit({"block": layer, "performance": spent}, [block_file(layer)])
                progress.advance()
            progress.finish()
            manifest = _finish(work, reader, rest.name, format_name, sha256_json(inputs))
        return QuantizeSummary(out, manifest, read_json(out / PERFORMANCE))


def plan_adoption(model: str | Path) -> dict[str, Any]:
    """The same checks as :func:`adopt` makes beforehand, and what it would do; reads no weight."""
    format_name, reader = _open(model)
    config = reader.config
    return {
        "model": reader.index.name,
        "format": format_name,
        "scheme": reader.scheme.name,
        "blocks": config.num_layers,
        "linears": len(config.linears),
        "codes_bytes": int(config.linear_parameters * reader.scheme.bits_per_weight / 8),
    }


def _open(model: str | Path) -> tuple[str, PackedReader]:
    folder = resolve_model(str(model))
    writer = writer_of(folder)
    reader = writer.read(folder)
    if not isinstance(reader, PackedReader):
        raise InputError(f"{folder}: codes of {writer.FORMAT} artifacts are not taken over", "give a checkpoint folder")
    for name in reader.config.linears:
        if not reader.holds_integers(name):
            raise InputError(
                f"{folder}: {name} is not quantized, and a run holds codes of every linear",
                "quantize the full-precision model instead",
            )
    for name, scheme in reader.exceptions.items():
        if name.startswith("model.layers.") and scheme != reader.scheme:
            raise InputError(
                f"{folder}: {name} is on {scheme.name}, others on {reader.scheme.name}; one scheme is taken over"
            )
    for name in ("lm_head", "model.embed_tokens"):
        if reader.holds_integers(name):
            raise InputError(f"{folder}: {name} is quantized, and a run holds codes of the blocks' linears only")
    check_tokenizer(reader.index)
    return writer.FORMAT, reader


def _linears(reader: PackedReader, layer: int) -> Iterator[QuantizedLinear]:
    for name in LINEARS:
        linear = reader.quantized(f"model.layers.{layer}.{name}")
        assert linear is not None, "looked at before"
        yield linear


def _finish(work: Workdir, reader: PackedReader, model: str, format_name: str, key: str) -> dict[str, Any]:
    config, scheme = reader.config, reader.scheme
    made = reader.raw.get("meta") or {}
    quantizer = made.get("quantizer") if isinstance(made, dict) else None
    recipe = {"method": ADOPTED, "format": format_name, "quantizer": quantizer, "scheme": scheme.name}
    manifest = {
        "schema": "phi4edge/quantize/1",
        "ok": True,
        "data": {
            "model": model,
            "scheme": scheme.name,
            "method": ADOPTED,
            "recipe": recipe,
            "key": key,
            "corpus": None,
            "quantized_fraction": config.linear_parameters / config.parameters,
            "bits_per_weight": scheme.bits_per_weight,
            "types": {},
            "tables": {},
            "allocation": None,
            "events": [],
            "linears": [{"name": name, "method": ADOPTED} for name in config.linears],
            "tuning": None,
            "files": {name: digest for record in work.records for name, digest in record["files"].items()},
        },
    }
    blocks = [record["performance"] for record in work.records]
    write_json(work.path / PERFORMANCE, {**total_cost(blocks), "block_seconds": [b["seconds"] for b in blocks]})
    write_json(work.path / MANIFEST, manifest)
    return manifest
