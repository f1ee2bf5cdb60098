"""Large arrays on huge pages: on Linux, memory fresh from the system is handed over 2 MiB at a time, not 4 KiB.

A block's activations and weights are gigabytes that come and go, and each first touch of a page is a call into the
kernel: on small pages a forward product spent half of its time there. The C library asks for huge pages if it is told
to when the process starts (``glibc.malloc.hugetlb``), so a process that was not starts itself again, once.
"""

from __future__ import annotations

__all__ = ["TUNABLE", "restarted_environment", "take_tunable_back", "use_huge_pages", "what_the_system_says"]

import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_VARIABLE = "GLIBC_TUNABLES"
_ASKED = f"{TUNABLE}=1"
_MARK = "PHI4EDGE_HUGE_PAGES"  # what the variable was before, for this process's children
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restarted_environment(environment: Mapping[str, str], system: str | None) -> dict[str, str] | None:
    """The environment to start again with; None where that would change nothing, or the user has decided.

    ``system`` is what Linux says of huge pages: "always [madvise] never", the present choice in brackets.
    """
    before = environment.get(_VARIABLE, "")
    if system is None or "[madvise]" not in system or TUNABLE in before or _MARK in environment:
        return None
    return {**environment, _VARIABLE: f"{before}:{_ASKED}" if before else _ASKED, _MARK: before}


def take_tunable_back(environment: MutableMapping[str, str]) -> None:
    """Leave to children the environment that the user gave: a runtime is measured as its users run it."""
    before = environment.pop(_MARK, None)
    if before:
        environment[_VARIABLE] = before
    elif before is not None:
        environment.pop(_VARIABLE, None)


def use_huge_pages(command: Sequence[str]) -> None:
    """Start this process again, as ``command``, where that gets it huge pages; where not, or by then, go on."""
    if _MARK in os.environ:
        take_tunable_back(os.environ)
        return
    environment = restarted_environment(os.environ, what_the_system_says())
    if environment is not None:
        os.execve(sys.executable, list(command), environment)


def what_the_system_says() -> str | None:
    """Linux's word on huge pages; None where there is none."""
    return _SYSTEM.read_text() if _SYSTEM.is_file() else None
