"""Which targets there are: the built-in files, the user's own, and this machine.

A user's folder holds target files like the built-in ones; an id that is there too takes the built-in's place, and
that is said. Folders given on the command line come before those of ``$PHI4EDGE_TARGET_PATH``, and the first folder
that has an id wins, as on a ``PATH``.
"""

from __future__ import annotations

__all__ = ["TARGET_PATH", "Catalog", "Entry", "open_catalog"]

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4edge.core.errors import InputError, UsageError, closest
from phi4edge.core.resources import data_folder
from phi4edge.targets.local import detect_local
from phi4edge.targets.profile import LOCAL, Profile
from phi4edge.targets.schema import read_profile

TARGET_PATH = "PHI4EDGE_TARGET_PATH"


@dataclass(frozen=True)
class Entry:
    """A target's file; it is read when asked for, so that a broken one hides no other."""

    id: str
    path: Path | None  # None: this machine, detected
    user: bool
    replaces: Path | None = None  # the file with the same id that this one hides

    def profile(self) -> Profile:
        """Read and check the file, or look at this machine.

        Raises:
            InputError: the file breaks the schema.
        """
        return detect_local() if self.path is None else read_profile(self.path)


@dataclass(frozen=True)
class Catalog:
    """All targets by id: this machine first, then by name."""

    entries: Mapping[str, Entry]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about where the targets come from: one line for each that hides another."""
        return tuple(f"{e.id}: {e.path} takes the place of {e.replaces}" for e in self.entries.values() if e.replaces)

    def entry(self, name: str) -> Entry:
        """The entry called ``name``.

        Raises:
            UsageError: there is none; the closest id is offered.
        """
        if name not in self.entries:
            near = closest(name, self.entries)
            raise UsageError(
                f"unknown target {name!r}",
                f"did you mean {near!r}? all: phi4edge targets list" if near else f"known: {', '.join(self.entries)}",
            )
        return self.entries[name]

    def profile(self, name: str) -> Profile:
        """The profile called ``name``; raises as :meth:`entry` and :meth:`Entry.profile` do."""
        return self.entry(name).profile()


def open_catalog(folders: Sequence[Path] = (), *, builtin: Path | None = None) -> Catalog:
    """Find all target files; ``folders`` come before those of ``$PHI4EDGE_TARGET_PATH``.

    Raises:
        InputError: a folder does not exist, holds no target file, or one called local.toml.
    """
    named = [(folder, "--target-path") for folder in folders]
    named += [(Path(f), f"${TARGET_PATH}") for f in os.environ.get(TARGET_PATH, "").split(os.pathsep) if f]
    found: dict[str, Entry] = {}
    for folder, origin in named:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder (from {origin})", "name a folder with target files, *.toml")
        files = sorted(folder.glob("*.toml"))
        if not files:
            raise InputError(f"{folder}: no *.toml in it (from {origin})", "targets/README.md tells how to write one")
        for path in files:
            if path.stem == LOCAL:
                read_profile(path)  # refuses the name
            if path.stem not in found:
                found[path.stem] = Entry(path.stem, path, user=True)
    for path in sorted((builtin or data_folder("targets")).glob("*.toml")):
        mine = found.get(path.stem)
        found[path.stem] = Entry(path.stem, mine.path, True, path) if mine else Entry(path.stem, path, user=False)
    return Catalog({LOCAL: Entry(LOCAL, None, user=False)} | dict(sorted(found.items())))
