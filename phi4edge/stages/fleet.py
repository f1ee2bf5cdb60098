"""Several devices measured in one go: different machines at the same time, one machine's targets one after the other.

A device that fails or vanishes costs nobody else anything. What was measured until then lies in its documents, what
failed has one that says why, and the others go on. A run that is started again measures what is missing: a document of
the same artifact (by its hash), asked for in the same way, is kept.
"""

from __future__ import annotations

__all__ = ["Step", "Visit", "Visited", "first_failure", "visit_all"]

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4edge.core.atomic import write_json
from phi4edge.core.errors import Phi4EdgeError
from phi4edge.core.events import SILENT, Progress
from phi4edge.targets.profile import LOCAL


@dataclass(frozen=True)
class Visit:
    """One artifact on one target's device."""

    target: str
    artifact: Path
    sha256: str  # of the artifact
    machine: str  # visits of the same one do not overlap
    asked: Mapping[str, Any] = field(default_factory=dict)  # how it shall be measured, and where: JSON values

    def document(self, results: Path, kind: str) -> Path:
        """Where the result of step ``kind`` lies."""
        target = "" if self.target == LOCAL else f".{self.target}"
        return results / f"{self.artifact.name}{target}.{kind}.json"


Step = Callable[[Visit, Progress], dict[str, Any]]  # measures, and returns the data of a document


@dataclass(frozen=True)
class Visited:
    """What came of a visit."""

    visit: Visit
    data: Mapping[str, dict[str, Any]]  # step → the data of its document; up to the step that failed
    kept: tuple[str, ...]  # steps that had been measured before
    error: Phi4EdgeError | None = None


class _Notes(Progress):
    """Lines of several devices at once; their bars would overwrite each other."""

    def __init__(self, progress: Progress, lock: threading.Lock, target: str) -> None:
        self._progress, self._lock, self._target = progress, lock, target

    def note(self, text: str) -> None:
        """A line that begins with the target."""
        with self._lock:
            self._progress.note(f"{self._target}: {text}")


def visit_all(
    visits: Iterable[Visit],
    steps: Mapping[str, Step],
    results: Path,
    *,
    anew: bool = False,
    progress: Progress = SILENT,
) -> list[Visited]:
    """Take ``steps`` (kind of document → what measures it) in order at every visit; the outcomes in the visits' order.

    ``anew``: measure again what had been measured.
    """
    visits, lock = list(visits), threading.Lock()
    machines: dict[str, list[int]] = {}
    for number, visit in enumerate(visits):
        machines.setdefault(visit.machine, []).append(number)
    found: dict[int, Visited] = {}

    def work(numbers: Sequence[int]) -> None:
        for number in numbers:
            visit = visits[number]
            found[number] = _visit(visit, steps, results, anew, _Notes(progress, lock, visit.target))

    with ThreadPoolExecutor(max(len(machines), 1), thread_name_prefix="device") as pool:
        futures = [pool.submit(work, numbers) for numbers in machines.values()]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[number] for number in range(len(visits))]


def first_failure(visited: Iterable[Visited]) -> Phi4EdgeError | None:
    """The error that the whole ends with: that of the first target that failed."""
    return next((each.error for each in visited if each.error is not None), None)


def _visit(visit: Visit, steps: Mapping[str, Step], results: Path, anew: bool, progress: Progress) -> Visited:
    data: dict[str, dict[str, Any]] = {}
    kept = []
    for kind, measure in steps.items():
        path = visit.document(results, kind)
        before = None if anew else _measured_before(path, visit)
        if before is not None:
            data[kind] = before
            kept.append(kind)
            progress.note(f"{kind} of {visit.artifact.name} is there already")
            continue
        progress.note(f"{kind} of {visit.artifact.name}")
        schema = f"phi4edge/{kind}/1"
        try:
            data[kind] = measure(visit, progress) | {"asked": _asked(visit)}
        except Phi4EdgeError as error:
            error.message = f"{visit.target}: {error.message}"
            told = {"code": error.exit_code, "message": error.message, "hint": error.hint}
            write_json(path, {"schema": schema, "ok": False, "error": told})
            progress.note(f"{kind} failed: {error.message}")
            return Visited(visit, data, tuple(kept), error)
        write_json(path, {"schema": schema, "ok": True, "data": data[kind]})
    return Visited(visit, data, tuple(kept))


def _asked(visit: Visit) -> dict[str, Any]:
    return {"target": visit.target, "sha256": visit.sha256, **visit.asked}


def _measured_before(path: Path, visit: Visit) -> dict[str, Any] | None:
    """The data of a document that answers this visit; None where there is none, or one of something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: cut off by hand, as ours appear only when whole
        return None
    if not isinstance(document, dict) or document.get("ok") is not True or not isinstance(document.get("data"), dict):
        return None
    data: dict[str, Any] = document["data"]
    return data if data.get("asked") == json.loads(json.dumps(_asked(visit))) else None
