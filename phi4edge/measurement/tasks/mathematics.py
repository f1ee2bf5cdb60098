r"""Answers to MATH problems: found in the text, compared as mathematics.

Two answers are the same when they are spelled alike but for what means nothing (spaces, \left, \dfrac, a unit's \text),
or when math-verify finds them equal: 1/2, \frac12 and 0.5. That runs in a process of its own, which is ended where a
comparison takes longer than :data:`SECONDS`; 9^{9^{9^9}} is then an answer that is not right.
"""

from __future__ import annotations

__all__ = ["MathJudge", "check_math", "last_boxed", "stated_answer"]

import importlib.util
import json
import re
import selectors
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from phi4edge.core.errors import MissingToolError
from phi4edge.measurement.tasks.numbers import last_number

SECONDS = 10.0  # for one comparison
_START_SECONDS = 120.0  # for importing SymPy on a busy machine
_STATED = re.compile(r"answer(?:\s+is)?\s*:?\s*([^\n]+)", re.IGNORECASE)
_DELIMITED = re.compile(r"\$+(.+?)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_PLAIN = (
    (re.compile(r"\\text\s*\{([^{}]*)\}|\\mbox\s*\{([^{}]*)\}"), r"\1\2"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\left|\\right|\\[!,;: ]|\^\{?\\circ\}?|[\s$]|\\%|%"), ""),
)  # fmt: skip


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{…} of ``text`` holds, braces matched; None where there is none that is closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = depth = 0
    for place in range(start, len(text)):
        if text[place] == "{":
            depth += 1
            begin = begin or place + 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:place]
    return None


def stated_answer(text: str) -> str | None:
    r"""The answer that ``text`` gives: boxed, or behind the last "answer is", or else its last number."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    stated = _STATED.findall(text)
    if stated:
        inner = _DELIMITED.search(stated[-1])
        return str(inner[inner.lastindex or 0] if inner else stated[-1]).strip(" *.")
    return last_number(text)


def _plain(text: str) -> str:
    for pattern, instead in _PLAIN:
        text = pattern.sub(instead, text)
    return text.rstrip(".").lower()


class MathJudge:
    """Compares answers; use as a context manager."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.timeouts = 0  # comparisons that were given up
        self._seconds = seconds
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, found: str, target: str) -> bool:
        """Whether ``found`` is ``target``.

        Raises:
            MissingToolError: math-verify is not installed.
        """
        if _plain(found) == _plain(target):
            return True
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps({"found": found, "target": target}) + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            self._end()
            return False
        answer = self._read(child, self._seconds)
        if answer is None:
            self.timeouts += 1
            self._end()
            return False
        return bool(answer["equal"])

    def _start(self) -> subprocess.Popen[str]:
        check_math()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "phi4edge.measurement.tasks._math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        if self._read(self._child, _START_SECONDS) is None:
            self._end()
            raise MissingToolError("math-verify does not start", _INSTALL)
        return self._child

    def _read(self, child: subprocess.Popen[str], seconds: float) -> Any:
        """The next answer; None where none came in time, or the child has ended."""
        assert child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        line = child.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # a request that it never read
                continue
        self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


_INSTALL = 'pip install "phi4edge[tasks]"'


def check_math() -> None:
    """Refuse to begin what could not be judged.

    Raises:
        MissingToolError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise MissingToolError("math500 needs the Python package math-verify, which is not installed", _INSTALL)
