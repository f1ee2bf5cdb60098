"""Plug-ins are files: the modules of a package, listed by name, imported when asked for.

A new solver, writer or runtime is one file in its package; the file's name is its registry name
(underscores become dashes on the command line nowhere: one spelling everywhere). Modules whose
name begins with an underscore are helpers, not plug-ins.
"""

from __future__ import annotations

__all__ = ["load", "names"]

import importlib
import pkgutil
from types import ModuleType

from phi4edge.core.errors import UsageError, closest


def names(package: str) -> tuple[str, ...]:
    """Names of the plug-ins in ``package`` (for example ``phi4edge.solvers``), sorted."""
    module = importlib.import_module(package)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(module.__path__) if not m.name.startswith("_")))


def load(package: str, name: str) -> ModuleType:
    """Import plug-in ``name`` of ``package``.

    Raises:
        UsageError: there is no such plug-in; the closest name is offered.
    """
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1].rstrip("s")
        near = closest(name, known)
        raise UsageError(
            f"unknown {kind} {name!r}",
            f"did you mean {near!r}? known: {', '.join(known)}" if near else f"known: {', '.join(known)}",
        )
    return importlib.import_module(f"{package}.{name}")
