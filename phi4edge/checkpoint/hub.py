"""A model argument is a folder, or else a hub id that huggingface_hub fetches."""

from __future__ import annotations

__all__ = ["model_name", "resolve_model"]

import re
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError, MissingToolError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt"]


def resolve_model(model: str) -> Path:
    """The local folder of ``model``; a hub id is downloaded (or found in the hub's cache).

    Raises:
        InputError: neither a folder nor a hub id, or the hub does not give it.
        MissingToolError: a hub id, but huggingface_hub is not installed.
    """
    folder = Path(model)
    if folder.exists() or not _HUB_ID.fullmatch(model):
        if folder.is_file():
            raise InputError(f"{folder}: is a file", "give the folder of a checkpoint, or a hub id")
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingToolError(f"{model}: huggingface_hub is not installed", "pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(model, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model}: no such folder, and the hub did not give it ({reason})",
            "check the name, the network and HF_TOKEN; or download it elsewhere and give the folder",
        ) from error


def model_name(folder: Path, raw: dict[str, Any]) -> str:
    """What to call the model in ``folder``: its hub name where that can be known, else the folder's name.

    ``raw`` is its config.json. The hub's cache keeps snapshots in folders named by a hash, below one with the name.
    """
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rsplit("--", 1)[-1]
    named = raw.get("_name_or_path")
    if isinstance(named, str) and _HUB_ID.fullmatch(named):
        return named.rsplit("/", 1)[-1]
    return folder.resolve().name
