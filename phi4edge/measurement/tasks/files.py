"""Finding a task's file in a folder by its publisher's name, and reading it: JSON lines (gzip too), or MGSM's TSV."""

from __future__ import annotations

__all__ = ["TaskFile", "find_file", "find_files", "read_rows"]

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError

_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".tsv")
_SPLITS = ("", "test", "validation", "val", "dev", "train")  # the first that is there is measured


@dataclass(frozen=True)
class TaskFile:
    """A file of a task."""

    path: Path
    split: str  # what its name says behind the task's: "test", "de"


def find_files(folder: Path, name: str) -> list[TaskFile]:
    """Files of ``folder`` and its folders whose name is ``name``, alone or with a split: gsm8k_test.jsonl,
    gsm8k/test.jsonl, HumanEval.jsonl.gz for humaneval. Case, hyphens and underscores do not matter.
    """
    found, wanted = [], _plain(name)
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        ending = next((e for e in _ENDINGS if path.name.lower().endswith(e)), None)
        if ending is None or not path.is_file():
            continue
        words = [w for w in re.split(r"[-_. ]+", path.name[: -len(ending)].lower()) if w]
        for count in range(len(words), 0, -1):
            if "".join(words[:count]) == wanted and len(words) - count <= 1:
                found.append(TaskFile(path, "".join(words[count:])))
                break
        else:
            if path.parent != folder and _plain(path.parent.name) == wanted and len(words) == 1:
                found.append(TaskFile(path, words[0]))
    return found


def find_file(folder: Path, name: str) -> TaskFile:
    """The file of task ``name``; of its splits test before train.

    Raises:
        InputError: none, or two that are the same split.
    """
    found = [file for file in find_files(folder, name) if file.split in _SPLITS]
    if not found:
        raise InputError(
            f"{folder}: no file of task {name!r} in it", f"it is looked for as {name}.jsonl, {name}_test.jsonl, …"
        )
    first = min(_SPLITS.index(file.split) for file in found)
    chosen = [file for file in found if _SPLITS.index(file.split) == first]
    if len(chosen) > 1:
        raise InputError(f"{folder}: task {name!r} has two files: {', '.join(str(f.path) for f in chosen)}", "keep one")
    return chosen[0]


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]+", "", name.lower())


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, or a TSV's lines (no quoting, no heading) under the names of ``columns``.

    Raises:
        InputError: unreadable, or a line that is no object; its number is named.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix == ".tsv":
            cells = line.rstrip("\r").split("\t")
            if len(cells) != len(columns):
                raise InputError(f"{path}: line {number} has {len(cells)} columns, not {len(columns)}")
            rows.append(dict(zip(columns, cells, strict=True)))
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not an object")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: is empty")
    return rows
