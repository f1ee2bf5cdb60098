"""JSON files that must hold an object."""

from __future__ import annotations

__all__ = ["read_object"]

import json
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError


def read_object(path: Path, hint: str | None = None) -> dict[str, Any]:
    """The JSON object in ``path``, which must exist.

    Raises:
        InputError: not UTF-8, not JSON, or not an object; ``hint`` says what to do about it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})", hint) from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a JSON object", hint)
    return document
