"""The command line in this process, as a script reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi4edge.cli.main import main


def call_json(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and document of a command with ``--json``."""
    code = main([str(a) for a in (*arguments, "--json", "-q")])
    return code, json.loads(capfd.readouterr().out)


def drift_of(artifact: Path, reference: Path, text: Path) -> tuple[object, ...]:
    """The words that ask for the drift of ``artifact`` on four short chunks."""
    given = {"--reference": reference, "--text": text, "--context": 64, "--chunks": 4, "--threads": 1}
    return ("drift", artifact, *(word for option in given.items() for word in option))
