"""SHA-256 of every file of an artifact, kept with it: what ``sha256sum -c`` and ``phi4edge verify`` hold it against.

A folder has ``SHA256SUMS`` and ``manifest.json`` in it; a file has ``NAME.sha256`` beside it. Both lists are in
``sha256sum``'s form, and are removed before an artifact is replaced, so that none describes another's bytes.
"""

from __future__ import annotations

__all__ = ["changed_files", "drop_sums", "has_sums", "rehash", "write_sums"]

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4edge.core.atomic import write_bytes, write_json
from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file
from phi4edge.core.jsonfile import read_object

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"


def _sums_file(path: Path) -> Path:
    return path / SUMS if path.is_dir() else path.with_name(f"{path.name}.sha256")


def has_sums(path: Path) -> bool:
    """Whether artifact ``path`` has a list of hashes."""
    return _sums_file(path).is_file()


def drop_sums(path: Path) -> None:
    """Remove the list that belongs to what is about to be replaced."""
    _sums_file(path).unlink(missing_ok=True)


def write_sums(path: Path, files: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
    """Write the hashes of a finished artifact: ``files`` is name → SHA-256. A folder gets the manifest too."""
    listed = dict(files)
    if path.is_dir():
        write_json(path / MANIFEST, {"schema": "phi4edge/artifact/1", **manifest, "files": listed})
        listed = {**listed, MANIFEST: sha256_file(path / MANIFEST)}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(listed.items()))
    write_bytes(_sums_file(path), text.encode())


def changed_files(path: Path) -> dict[str, str]:
    """What of the artifact at ``path`` is not as its list says: file name → "missing" or "changed".

    Raises:
        InputError: the list cannot be understood.
    """
    sums = _sums_file(path)
    found: dict[str, str] = {}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            raise InputError(f"{sums}: {line[:80]!r} is no line of sha256sum's", "export the artifact again")
        file = sums.parent / match[2]
        if not file.is_file():
            found[match[2]] = "missing"
        elif sha256_file(file) != match[1]:
            found[match[2]] = "changed"
    return found


def rehash(folder: Path, name: str) -> None:
    """Bring manifest and list up to date with file ``name``, which was changed on purpose."""
    if not has_sums(folder):
        return
    digest = sha256_file(folder / name)
    manifest = read_object(folder / MANIFEST)
    manifest["files"][name] = digest
    write_json(folder / MANIFEST, manifest)
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line[66:] not in (name, MANIFEST)]
    kept += [f"{digest}  {name}", f"{sha256_file(folder / MANIFEST)}  {MANIFEST}"]
    write_bytes(folder / SUMS, "".join(f"{line}\n" for line in sorted(kept, key=lambda line: line[66:])).encode())
