"""What models answered, kept: a question is asked once, and a process that was killed goes on with the next one.

    CACHE/answers/<key>/    a run directory (core/workdir.py): a journal line an answer, on disk before the next one

The key hashes what decides an answer beside the question: the model's hash, the runtime with its version and settings,
and the context that it was opened with. An answer is found again by the hash of its tokens, of what ends it, and of the
number and the file of worked examples before it.
"""

from __future__ import annotations

__all__ = ["AnswerStore"]

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from phi4edge.core.hashing import sha256_json
from phi4edge.core.workdir import Workdir
from phi4edge.measurement.reference import cache_folder


class AnswerStore:
    """The kept answers of one model in one runtime; use as a context manager."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        """Open, and lock, what is kept under ``identity``.

        Raises:
            ResumeError: another process is at it.
        """
        self.path: Path = cache_folder() / "answers" / sha256_json(dict(identity))[:32]
        self._directory = Workdir.open(self.path, identity)
        self._known: dict[str, dict[str, Any]] = {r["request"]: r["answer"] for r in self._directory.records}
        self.reused = 0  # answers that did not have to be computed

    def find(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The kept answer to ``request``, or None."""
        found = self._known.get(sha256_json(dict(request)))
        self.reused += found is not None
        return found

    def keep(self, request: Mapping[str, Any], answer: dict[str, Any]) -> None:
        """Put an answer on disk."""
        key = sha256_json(dict(request))
        self._directory.commit({"request": key, "answer": answer}, [])
        self._known[key] = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.__exit__(kind, error, trace)
