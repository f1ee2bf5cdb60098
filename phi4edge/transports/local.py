"""This machine itself: nothing is sent, runtimes are called in a child process."""

from __future__ import annotations

__all__ = ["DESCRIPTION", "TOOLS"]

DESCRIPTION = "this machine"
TOOLS: tuple[str, ...] = ()  # programs that the transport needs on this side
