"""Loops that Numba compiles, for what tensors would take many passes over memory to do."""

from __future__ import annotations

__all__ = ["compiled"]

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """``function`` compiled at its first call, run without Python's lock; division by zero gives what IEEE says.

    What was compiled is kept beside the module, or in the user's cache, where one of both can be written to.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # Numba found no place to keep it
        return njit(**options)(function)
