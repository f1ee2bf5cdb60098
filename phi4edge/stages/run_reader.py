"""Reads a finished run directory back: the codes, and the checkpoint that holds everything else."""

from __future__ import annotations

__all__ = [
    "ADOPTED",
    "IMATRIX",
    "MANIFEST",
    "PERFORMANCE",
    "block_file",
    "open_run",
    "read_block",
    "read_json",
    "read_manifest",
    "read_norms",
    "tuned_file",
]

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from phi4edge import __version__
from phi4edge.checkpoint.index import read_header
from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint, read_tensor
from phi4edge.core.errors import InputError, ResumeError
from phi4edge.core.hashing import sha256_json
from phi4edge.core.jsonfile import read_object
from phi4edge.core.workdir import RUN_FILE, differences
from phi4edge.model.block import LINEARS
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import Scheme, parse_scheme
from phi4edge.stages.inputs import LOCATION, hash_checkpoint
from phi4edge.transforms.rotation import rotated
from phi4edge.writers._packed_folder import open_rest

MANIFEST, PERFORMANCE, IMATRIX = "manifest.json", "performance.json", "imatrix.safetensors"
_LARGE = 1 << 24  # bytes of a tensor that is read once, and need not come into memory for others
ADOPTED = "adopted"  # the method of a run whose codes another tool decided


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run directory.

    Raises:
        InputError: it is damaged.
    """
    return read_object(path, "quantize again with --restart")


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        InputError: not a run directory, or the run is not finished.
    """
    if not (run / RUN_FILE).is_file():
        raise InputError(f"{run}: not a run directory", "give the --out of a finished `phi4edge quantize`")
    if not (run / MANIFEST).is_file():
        raise InputError(f"{run}: the run is not finished", "the same `phi4edge quantize` command goes on with it")
    return read_json(run / MANIFEST)


def block_file(layer: int) -> str:
    """Where a block's codes lie, within the run: codes and parameters, imatrix, and norm gains if they changed."""
    return f"blocks/{layer:05d}.safetensors"


def tuned_file(layer: int | None) -> str:
    """Where tuning left a block's parameters and norm gains; None: the final norm's gain."""
    return "tuning/rest.safetensors" if layer is None else f"tuning/{layer:05d}.safetensors"


def _tensors(path: Path, wanted: Callable[[str], bool], rows: slice | None = None) -> dict[str, Tensor]:
    refs = {key: ref for key, ref in read_header(path).items() if wanted(key)}
    return {key: read_tensor(ref, rows, around_cache=ref.nbytes >= _LARGE) for key, ref in refs.items()}


def read_linear(
    run: Path, name: str, scheme: Scheme, rows: slice | None = None, *, tuned: bool = False
) -> QuantizedLinear:
    """One linear of a committed block, or some ``rows`` of it; ``tuned``: with the parameters that tuning gave it."""
    layer = int(name.split(".")[2])

    def belongs(key: str) -> bool:
        return key.startswith(f"{name}.") and not key.endswith(".imatrix")

    tensors = _tensors(run / block_file(layer), belongs, rows)
    if tuned:
        tensors |= _tensors(run / tuned_file(layer), belongs, rows)
    return QuantizedLinear.from_tensors(name, scheme, tensors)


def read_block(run: Path, layer: int, scheme_of: Callable[[str], Scheme]) -> list[QuantizedLinear]:
    """The four linears of a committed block, in order of use, before any tuning."""
    names = [f"model.layers.{layer}.{name}" for name in LINEARS]
    return [read_linear(run, name, scheme_of(name)) for name in names]


def read_norms(run: Path, layer: int | None, *, tuned: bool = False) -> dict[str, Tensor]:
    """Norm gains of a block (None: the final one) that the run changed, by checkpoint name, float32."""
    found = _tensors(run / block_file(layer), is_norm) if layer is not None else {}
    if tuned:
        found |= _tensors(run / tuned_file(layer), is_norm)
    return {name: gain.float() for name, gain in found.items()}


def is_norm(key: str) -> bool:
    """Whether a stored tensor is a norm's gain."""
    return key.endswith("norm.weight")


def open_run(run: Path, model: str | Path | None = None) -> QuantizedModel:
    """A finished run as writers take it; ``model`` says where the checkpoint lies now if it was moved.

    Raises:
        InputError: the run is not finished, or its checkpoint is gone.
        ResumeError: the checkpoint is not the one that the run was made from.
    """
    manifest = read_manifest(run)["data"]
    location = read_json(run / LOCATION)
    folder = str(model) if model is not None else str(location["folder"])
    if model is None and not Path(folder).is_dir():
        raise InputError(f"{folder}: the run's checkpoint is gone", "say where it lies now with --model")
    adopted = manifest["method"] == ADOPTED
    checkpoint = CheckpointReader(open_rest(Path(folder))) if adopted else open_checkpoint(folder)
    hashes = hash_checkpoint(checkpoint.index, run)
    inputs = read_json(run / RUN_FILE)["inputs"]
    changed = differences(inputs["checkpoint"], hashes, "checkpoint")
    if changed:
        raise ResumeError(
            f"{checkpoint.index.folder} is not the checkpoint of {run}: {'; '.join(changed[:3])}",
            "give the original one with --model, or quantize again",
        )
    config = checkpoint.config
    scheme = parse_scheme(manifest["scheme"])
    tuned = manifest.get("tuning") is not None
    names = tuple(config.linears)

    def load_rows(name: str, rows: slice | None = None) -> QuantizedLinear:
        return read_linear(run, name, exceptions.get(name, scheme), rows, tuned=tuned)

    @lru_cache(maxsize=1)
    def load(name: str) -> QuantizedLinear:
        return load_rows(name)

    exceptions = {name: parse_scheme(other) for name, other in manifest["types"].items()}
    replaced: dict[str, Tensor] = {}
    for layer in (*range(config.num_layers), None):
        replaced |= read_norms(run, layer, tuned=tuned)
    corpus, recipe = manifest["corpus"], manifest["recipe"]
    rotation = recipe.get("rotation", "none")
    if corpus is not None:
        text = f"{corpus['name']}, {corpus['samples']} × {corpus['sequence_length']} tokens"
    else:
        text = "unknown" if adopted else "none"
    given = manifest.get("imatrix")
    if given is not None:
        text = f"imatrix of {', '.join(given['datasets']) or 'an unnamed text'}, {given['tokens']} tokens"
    provenance = {
        "version": __version__,
        "run_key": manifest["key"],
        "recipe_sha256": sha256_json(recipe),
        "base_model": manifest["model"],
        "checkpoint_sha256": sha256_json(inputs["checkpoint"]),
        "method": manifest["method"],
        "scheme": scheme.name,
        "rotation": rotation,
        "calibration": text,
        "calibration_sha256": corpus["sha256"] if corpus is not None else given["sha256"] if given else "none",
    }
    base = None if rotation == "none" else rotated(checkpoint, rotation, recipe["rotation_seed"])
    tables = manifest["tables"]
    return QuantizedModel(
        checkpoint, scheme, names, load, provenance, replaced, exceptions, tables, base, load_rows=load_rows
    )
