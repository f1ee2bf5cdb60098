"""What a run measured of its linears' inputs, as an importance matrix for llama.cpp's tools."""

from __future__ import annotations

__all__ = ["export_imatrix"]

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from phi4edge.core.errors import InputError
from phi4edge.core.workdir import CALIBRATION
from phi4edge.stages.run_reader import IMATRIX, MANIFEST, read_json
from phi4edge.writers._imatrix import Imatrix, write_imatrix


def export_imatrix(run: Path, out: Path, *, force: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Write ``run``'s imatrix to ``out`` as llama-imatrix would; returns what was written.

    Taken is what ``calibrate`` measured on the full-precision model, as llama-imatrix does, or else what
    ``quantize`` measured, where each linear sees the quantized ones before it.

    Raises:
        InputError: nothing was measured in ``run``, or ``out`` exists.
    """
    folders = [folder for folder in (run / CALIBRATION, run) if (folder / IMATRIX).is_file()]
    if not folders or not (folders[0] / MANIFEST).is_file():
        raise InputError(
            f"{run}: holds no imatrix", "run `phi4edge calibrate MODEL --out RUN`, or quantize with calibration text"
        )
    if out.exists() and not force:
        raise InputError(f"{out}: already exists", "choose another --out, or pass --force to replace it")
    folder = folders[0]
    manifest = read_json(folder / MANIFEST)["data"]
    recipe = manifest["recipe"]
    if recipe.get("rotation", "none") != "none" or recipe.get("awq") or recipe.get("method") == "awq":
        raise InputError(
            f"{run}: its imatrix is of rotated or scaled channels, which the checkpoint has not",
            "run `phi4edge calibrate MODEL --out RUN` and export that one",
        )
    values = {name.removesuffix(".imatrix"): tensor for name, tensor in load_file(folder / IMATRIX).items()}
    name, tokens, chunks, size = _measured_on(manifest)
    imatrix = Imatrix(values, tokens, (name,), chunks, size)
    measured = "full precision" if folder != run or "method" not in manifest else "the quantized model"
    digest = None if dry_run else write_imatrix(out, imatrix)
    return {
        "path": str(out),
        "format": "imatrix",
        "linears": len(values),
        "tokens": tokens,
        "dataset": name,
        "measured_on": measured,
        "sha256": digest,
    }


def _measured_on(manifest: dict[str, Any]) -> tuple[str, int, int, int]:
    """Corpus, tokens, samples and their length."""
    if "method" not in manifest:  # of calibrate
        recipe = manifest["recipe"]
        return recipe["corpus"], manifest["tokens"], recipe["samples"], recipe["sequence_length"]
    given = manifest.get("imatrix")
    if given is not None:  # it came from elsewhere
        return ", ".join(given["datasets"]), given["tokens"], given["chunks"], given["chunk_size"]
    corpus = manifest["corpus"]
    kept = corpus["samples"] - corpus["held_out"]
    return corpus["name"], kept * corpus["sequence_length"], kept, corpus["sequence_length"]
