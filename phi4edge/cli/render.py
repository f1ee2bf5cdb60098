"""What the command line prints: the result on stdout, everything else on stderr.

With ``--json`` stdout is one document, ``{"schema": "phi4edge/<command>/1", "ok": true, "data": …}`` or
``{"schema": …, "ok": false, "error": {"code", "message", "hint"}}``.
"""

from __future__ import annotations

__all__ = ["duration", "emit", "emit_error", "emit_failure", "envelope", "failure_document", "table", "time_text"]

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from phi4edge.core.errors import Phi4EdgeError


def envelope(command: str, data: Any) -> dict[str, Any]:
    """The document of a command that succeeded."""
    return {"schema": f"phi4edge/{command}/1", "ok": True, "data": data}


def emit(command: str, data: Any, text: str, *, as_json: bool) -> None:
    """Print a command's result: the JSON document, or ``text``."""
    if as_json:
        click.echo(json.dumps(envelope(command, data), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(text)


def failure_document(command: str, data: Any, error: Phi4EdgeError) -> dict[str, Any]:
    """The document of a command that has results and failed all the same."""
    body = {"code": error.exit_code, "message": error.message, "hint": error.hint}
    return envelope(command, data) | {"ok": False, "error": body}


def emit_failure(command: str, data: Any, text: str, error: Phi4EdgeError, *, as_json: bool) -> NoReturn:
    """Show what was computed, then fail: ``text`` and the error's two lines, or one document with both.

    Raises:
        Phi4EdgeError: ``error``, after ``text`` is on stdout.
        click.exceptions.Exit: with ``error``'s exit code, after the document is on stdout.
    """
    if not as_json:
        click.echo(text)
        raise error
    click.echo(json.dumps(failure_document(command, data, error), indent=2, ensure_ascii=False, allow_nan=False))
    raise click.exceptions.Exit(error.exit_code)


def emit_error(command: str, error: Phi4EdgeError, *, as_json: bool, code: int) -> None:
    """Print an error: the JSON document on stdout, or ``Error:`` and ``Hint:`` lines on stderr."""
    if as_json:
        body = {"code": code, "message": error.message, "hint": error.hint}
        document = {"schema": f"phi4edge/{command}/1", "ok": False, "error": body}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    click.echo(f"Error: {error.message}", err=True)
    if error.hint:
        click.echo(f"Hint: {error.hint}", err=True)


def duration(seconds: float) -> str:
    """Seconds as a reader plans with them: 0.4 s, 41 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def time_text(time: Mapping[str, Any] | None) -> str:
    """How long quantizing would take, and what most of it goes into."""
    if time is None:
        return "not estimated on this device"
    parts = {name: seconds for name, seconds in time["parts_seconds_estimated"].items() if seconds > 0}
    shares = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    left_out = "".join(f"; without {name}, which has no estimate" for name in time["not_estimated"])
    return f"about {duration(time['seconds_estimated'])} on this machine (estimated: {shares}){left_out}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A plain-text table; columns whose index is in ``numeric`` are set flush right."""
    widths = [max(len(str(row[i])) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        parts = [
            str(c).rjust(w) if i in numeric else str(c).ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), line(["─" * w for w in widths]), *(line(row) for row in rows)])
