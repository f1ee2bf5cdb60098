"""The run directory: work is committed in steps, each of which survives a kill at any instant.

A step writes its files aside, fsyncs and renames them, and then appends one line to ``journal.jsonl`` that names
them with their SHA-256. A step counts if and only if its line is whole and its files match. ``run.json`` holds
the inputs (checkpoint, recipe, corpus, code); a directory begun with other inputs is refused, naming the difference.

    RUN/run.json        inputs of the run
    RUN/journal.jsonl   {"record": {...}, "check": sha256 of the record}, one line a finished step
    RUN/calibration/    what `calibrate` prepared, a run directory of its own
    RUN/lock            held (flock) by the one process that works here
"""

from __future__ import annotations

__all__ = ["CALIBRATION", "JOURNAL", "RUN_FILE", "Workdir", "differences"]

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from phi4edge.core.atomic import PARTIAL, write_bytes, write_json
from phi4edge.core.disk import full_disk, is_full
from phi4edge.core.errors import InputError, ResumeError
from phi4edge.core.hashing import sha256_file, sha256_json

RUN_FILE, JOURNAL, LOCK = "run.json", "journal.jsonl", "lock"
CALIBRATION = "calibration"  # a run directory of its own inside: what `calibrate` prepared


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted names of the values that differ between two JSON documents, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [f"{path} was {_short(old)}, is now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:18]}…{text[-8:]}"


class Workdir:
    """One run directory, open and locked by this process. Use as a context manager."""

    def __init__(self, path: Path, records: list[dict[str, Any]], lock: int, repaired: str | None) -> None:
        self.path = path
        self.records = records  # what the journal holds, in order
        self.repaired = repaired  # what was dropped from a damaged journal, in words
        self._lock = lock

    @classmethod
    def open(cls, path: Path, inputs: Mapping[str, Any], *, restart: bool = False) -> Workdir:
        """Begin a run in ``path``, or go on with the one that was begun there with the same ``inputs``.

        Raises:
            InputError: ``path`` holds something else than a run.
            ResumeError: begun with other inputs, or another process works here.
        """
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file, not a run directory")
        foreign = path.is_dir() and any(path.iterdir()) and not (path / RUN_FILE).exists()
        if foreign and {p.name for p in path.iterdir()} - {LOCK, RUN_FILE + PARTIAL, CALIBRATION}:
            raise InputError(f"{path}: is not empty and not a run directory", "choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path / LOCK)
        try:
            if restart:
                _clear(path)
            for stray in path.glob(f"*{PARTIAL}"):  # of a process that was killed as it wrote
                stray.unlink()
            _begin(path, dict(inputs))
            records, repaired = _replay(path)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, records, lock, repaired)

    @staticmethod
    def clear(path: Path) -> None:
        """Remove what a run left in ``path``, as ``open(…, restart=True)`` does; nothing where nothing was begun.

        Raises:
            ResumeError: another process works here.
        """
        if not (path / RUN_FILE).is_file():
            return
        lock = _acquire(path / LOCK)
        try:
            _clear(path)
        finally:
            os.close(lock)

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        os.close(self._lock)

    def commit(self, record: dict[str, Any], files: Sequence[str] | Mapping[str, str]) -> None:
        """Append a finished step whose ``files`` (relative names) are already in place under their final names.

        They are read again to be hashed, but for those whose SHA-256 is given by name.

        Raises:
            TargetError: the disk is full.
        """
        known = files if isinstance(files, Mapping) else {name: sha256_file(self.path / name) for name in files}
        whole = {**record, "files": dict(known)}
        line = json.dumps({"record": whole, "check": sha256_json(whole)}, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with (self.path / JOURNAL).open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if is_full(error):  # a line cut off is dropped by the next process
                raise full_disk(self.path / JOURNAL, error) from error
            raise
        self.records.append(whole)

    def settle(self, inputs: Mapping[str, Any]) -> None:
        """``inputs`` take the place of those that the run was begun with: what was not known of them then is now.

        Raises:
            TargetError: the disk is full.
        """
        _write_inputs(self.path, dict(inputs))

    def drop_after(self, count: int, reason: str) -> None:
        """Keep the first ``count`` steps only; the rest will be done again."""
        self.records = self.records[:count]
        self.repaired = reason
        _rewrite(self.path, self.records)


def _acquire(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ResumeError(
            f"{path.parent}: another process is working in this run directory", "wait for it, or choose another --out"
        ) from error
    return descriptor


def _clear(path: Path) -> None:
    """Remove what a run left; the marker goes last, so that a kill in between leaves a run to clear."""
    for entry in sorted(path.iterdir()):
        if entry.name in (LOCK, RUN_FILE, CALIBRATION):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (path / RUN_FILE).unlink(missing_ok=True)


def _begin(path: Path, inputs: dict[str, Any]) -> None:
    marker = path / RUN_FILE
    if not marker.exists():
        _write_inputs(path, inputs)
        return
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))["inputs"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ResumeError(f"{marker}: damaged ({error})", "pass --restart to begin anew") from error
    changed = differences(found, json.loads(json.dumps(inputs)))
    if changed:
        more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
        raise ResumeError(
            f"{path} was begun with other inputs: {'; '.join(changed[:4])}{more}",
            "give the same inputs to go on, --restart to begin anew, or another --out",
        )


def _write_inputs(path: Path, inputs: dict[str, Any]) -> None:
    document = {"schema": "phi4edge/run-directory/1", "key": sha256_json(inputs), "inputs": inputs}
    write_json(path / RUN_FILE, document)


def _replay(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Whole lines of the journal up to the first damaged one; what follows it is dropped from the file."""
    journal = path / JOURNAL
    if not journal.exists():
        return [], None
    raw = journal.read_bytes()
    records: list[dict[str, Any]] = []
    lines = raw.split(b"\n")
    for line in lines[:-1]:  # a line without its newline was being written when the process died
        try:
            entry = json.loads(line)
            whole = entry["record"]
            intact = entry["check"] == sha256_json(whole)
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            break
        records.append(whole)
    if len(records) == len(lines) - 1 and not lines[-1]:
        return records, None
    _rewrite(path, records)
    return records, f"journal damaged after {len(records)} steps; what followed is done again"


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    lines = (json.dumps({"record": r, "check": sha256_json(r)}, ensure_ascii=False, allow_nan=False) for r in records)
    write_bytes(path / JOURNAL, "".join(f"{line}\n" for line in lines).encode())
