"""What an artifact is: its name, format, scheme, size and hash, read from headers alone (but for the hash)."""

from __future__ import annotations

__all__ = ["default_runtime", "describe"]

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file, sha256_json
from phi4edge.core.workdir import RUN_FILE
from phi4edge.writers._onnx_names import GENAI_CONFIG

_OWN = "phi4edge."  # keys that our writers put into a GGUF or an ONNX graph
_BULKY = "phi4edge.config"
_DESCRIPTIVE = ("README.md", "manifest.json", "SHA256SUMS")  # what tells of an artifact, drift included


def default_runtime(artifact: Path) -> str:
    """The runtime that an artifact is measured in when the user names none."""
    if (artifact / GENAI_CONFIG).is_file():
        return "onnxruntime_genai"
    return "torch_ref" if artifact.is_dir() else "llama_cpp"


def describe(artifact: Path) -> dict[str, Any]:
    """``path, name, format, scheme, sha256, bytes`` of an artifact, and its ``provenance`` where it tells it.

    The hash of a folder, or of a GGUF in several files, is over its files' hashes, but for those that only tell of it:
    model card, manifest, sums.

    Raises:
        InputError: no such thing, or a damaged header.
    """
    if not artifact.exists():
        raise InputError(f"{artifact}: no such file or folder")
    made: dict[str, Any] = {}
    if artifact.is_dir():
        if (artifact / GENAI_CONFIG).is_file():
            from phi4edge.writers._onnx_file import read_onnx

            format_name, said = "onnx", read_onnx(artifact).metadata
            scheme, made = said.get(f"{_OWN}scheme"), _provenance(said)
        else:
            format_name, scheme = _folder_kind(artifact)
        files = sorted(path for path in artifact.rglob("*") if path.is_file())
        if not files:
            raise InputError(f"{artifact}: the folder is empty")
        decisive = [path for path in files if path.parent != artifact or path.name not in _DESCRIPTIVE]
        digest = sha256_json({str(path.relative_to(artifact)): sha256_file(path) for path in decisive})
        nbytes = sum(path.stat().st_size for path in files)
    else:
        from phi4edge.writers._gguf_file import read_gguf

        parts = read_gguf(artifact)
        header = parts.metadata
        format_name, scheme = "gguf", str(header.get(f"{_OWN}scheme") or _file_type(header))
        made = _provenance(header)
        hashes = {path.name: sha256_file(path) for path in parts.files}
        digest = sha256_json(hashes) if len(hashes) > 1 else hashes[artifact.name]
        nbytes = sum(path.stat().st_size for path in parts.files)
    return {
        "path": str(artifact),
        "name": artifact.resolve().name,
        "format": format_name,
        "scheme": scheme,
        "sha256": digest,
        "bytes": nbytes,
        "provenance": made,
    }


def _provenance(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(_OWN): v for k, v in metadata.items() if k.startswith(_OWN) and k != _BULKY}


def _folder_kind(folder: Path) -> tuple[str, str | None]:
    if (folder / RUN_FILE).is_file():
        manifest = _json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
        return "run", manifest.get("data", {}).get("scheme")
    if not (folder / "config.json").is_file():
        return "folder", None
    config = _json(folder / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return "safetensors", config.get("torch_dtype") or config.get("dtype")
    group, kind = quantization.get("group_size", -1), "" if quantization.get("sym", True) else "-asym"
    name = f"w{quantization.get('bits')}{'row' if group == -1 else f'g{group}'}{kind}"
    return str(quantization.get("quant_method", "unknown")), name


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: is not a JSON object")
    return document


def _file_type(header: Mapping[str, Any]) -> str:
    import gguf

    number = header.get("general.file_type")
    try:
        return str(gguf.LlamaFileType(number).name).removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    except ValueError:
        return "unknown"
