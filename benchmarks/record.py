"""What a result file says beside its figures: command, machine and commit; and README tables made from it."""

from __future__ import annotations

__all__ = ["machine_name", "record", "update_readme"]

import subprocess
from pathlib import Path
from typing import Any

from phi4edge.core.atomic import write_json
from phi4edge.measurement.environment import environment

ROOT = Path(__file__).resolve().parents[1]


def git(sources: tuple[str, ...]) -> dict[str, Any]:
    """The commit, and whether the code that was run (``sources``) is that commit's."""

    def run(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--", *sources))}


def record(path: Path, command: str, results: Any, sources: tuple[str, ...]) -> dict[str, Any]:
    """Write a result file and return its document."""
    document = {
        "command": command,
        "machine": environment(),
        "git": git(("phi4edge", *sources)),
        "results": results,
    }
    write_json(path, document)
    return document


def machine_name(machine: dict[str, Any]) -> str:
    """A CPU's name with what a virtual machine hides of it: family/model/stepping, where that was recorded."""
    cpu = machine["cpu"]
    return f"{cpu['model']} ({cpu['generation']})" if cpu.get("generation") else str(cpu["model"])


def update_readme(readme: Path, marker: str, table: str) -> None:
    """Put ``table`` between the README's ``<!-- marker: begin -->`` and ``<!-- marker: end -->``."""
    text = readme.read_text(encoding="utf-8")
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    readme.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")
