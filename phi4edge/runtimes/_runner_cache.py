"""Runners that were built: ``$XDG_CACHE_HOME/phi4edge/runners/<arch>/<key>/``, shared by all clones.

    <key>/runner.json        what it was made from, and the SHA-256 of every file
    <key>/llama-bench …      the programs
    <key>/licences/…         llama.cpp's, and of the libraries that its sources contain
    <key>.partial/           a build at work, or an interrupted one
    <key>.lock               held (flock) by all that work in <key>.partial

``built`` is for those who carry a runner to a device.
"""

from __future__ import annotations

__all__ = ["MANIFEST", "SCHEMA", "Runner", "built", "interrupted", "read_runner", "runners", "runners_folder"]

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.core.atomic import PARTIAL
from phi4edge.core.errors import InputError, MissingToolError
from phi4edge.core.hashing import sha256_file
from phi4edge.core.jsonfile import read_object
from phi4edge.runtimes._runner_recipe import ARCHITECTURES, DEFAULT_MARCH
from phi4edge.runtimes._runner_sources import PACKAGE, installed_version

MANIFEST = "runner.json"
SCHEMA = "phi4edge/runner/1"


@dataclass(frozen=True)
class Runner:
    """A runner in the cache, or in a folder where it was put."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def arch(self) -> str:
        """The processor it is for."""
        return str(self.manifest["arch"])

    @property
    def march(self) -> str:
        """The instruction set it needs."""
        return str(self.manifest["march"])

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def faults(self) -> list[str]:
        """What of its files is missing or changed, in words; reads all of them."""
        found = []
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif sha256_file(path) != entry["sha256"]:
                found.append(f"{name} is not the file that was built")
        return found


def runners_folder(arch: str) -> Path:
    """Where the runners for ``arch`` are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "phi4edge" / "runners" / arch


def read_runner(folder: Path) -> Runner:
    """The runner in ``folder``.

    Raises:
        InputError: there is none, or its manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no runner, {MANIFEST} is missing", "phi4edge runner build makes one")
    document = read_object(path, "remove the folder and build it again")
    files = document.get("files")
    whole = isinstance(files, dict) and all(
        isinstance(e, dict) and {"bytes", "sha256"} <= set(e) for e in files.values()
    )
    if document.get("schema") != SCHEMA or not whole or not {"arch", "march", "key", "created"} <= set(document):
        raise InputError(f"{path}: not a runner's manifest", "remove the folder and build it again")
    return Runner(folder, document)


def runners() -> tuple[list[Runner], list[str]]:
    """All that are cached, the newest first, and what is wrong with those whose manifest cannot be read."""
    found, wrong = [], []
    for arch in ARCHITECTURES:
        for path in runners_folder(arch).glob(f"*/{MANIFEST}"):
            if path.parent.name.endswith(PARTIAL):
                continue
            try:
                found.append(read_runner(path.parent))
            except InputError as error:
                wrong.append(error.message)
    return sorted(found, key=lambda r: (r.manifest["created"], r.manifest["key"]), reverse=True), wrong


def interrupted() -> list[Path]:
    """Folders of builds that have not ended: at work still, or killed."""
    return sorted(path for arch in ARCHITECTURES for path in runners_folder(arch).glob(f"*{PARTIAL}"))


def built(arch: str, march: str | None = None) -> Path | None:
    """The folder of a whole runner for ``arch``, or None: its programs are ``folder / "llama-bench"`` and so on.

    Without ``march``, the instruction set that all targets of ``arch`` have and no other, since a program for more
    dies on a device that has less. A runner of the installed llama-cpp-python comes first, then the newest. One with a
    file that is missing or changed is passed over; ``phi4edge runner list`` shows it, and building makes it anew.
    """
    wanted = march or DEFAULT_MARCH.get(arch)  # none: nothing is built for that processor
    try:
        here = {"package": PACKAGE, "version": installed_version()}
    except MissingToolError:
        here = {}
    candidates = [runner for runner in runners()[0] if (runner.arch, runner.march) == (arch, wanted)]
    candidates.sort(key=lambda runner: runner.manifest.get("source") != here)  # stable: the newest first in each half
    return next((runner.folder for runner in candidates if not runner.faults()), None)
