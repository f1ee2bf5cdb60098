"""Every error that phi4edge raises on purpose, each with its exit code.

    Phi4EdgeError              1   something went wrong that is not the user's doing
    ├── UsageError             2   the command line or a recipe is wrong
    ├── InputError             3   a model, a text or a file is wrong
    ├── TargetError            4   the target or the RAM budget cannot hold it
    ├── MissingToolError       5   a tool, a package or a device is missing
    ├── GateError              6   a measured value missed its gate (results are written first)
    ├── ResumeError            7   the run directory was begun with other inputs
    └── VerifyError            8   an artifact differs from what it should be

``message`` says what is wrong, where, and which two numbers disagree; ``hint`` says what to do next.
"""

from __future__ import annotations

__all__ = [
    "GateError",
    "InputError",
    "MissingToolError",
    "Phi4EdgeError",
    "ResumeError",
    "TargetError",
    "UsageError",
    "VerifyError",
    "closest",
]

import difflib
from collections.abc import Iterable


class Phi4EdgeError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the process returns."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Phi4EdgeError):
    """The command line, an environment variable or a recipe is wrong."""

    exit_code = 2


class InputError(Phi4EdgeError):
    """A model, a text or another input file is wrong."""

    exit_code = 3


class TargetError(Phi4EdgeError):
    """The target device, or the memory budget, cannot hold or run what was asked."""

    exit_code = 4


class MissingToolError(Phi4EdgeError):
    """A tool, a Python package or a device that the command needs is not there."""

    exit_code = 5


class GateError(Phi4EdgeError):
    """A measured value missed its gate; the results were written before this was raised."""

    exit_code = 6


class ResumeError(Phi4EdgeError):
    """The run directory was begun with other inputs than the ones given now."""

    exit_code = 7


class VerifyError(Phi4EdgeError):
    """An artifact does not hold what its run decided."""

    exit_code = 8


def closest(word: str, known: Iterable[str]) -> str | None:
    """The entry of ``known`` most like ``word``, or None when nothing is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
