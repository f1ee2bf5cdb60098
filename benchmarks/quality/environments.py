"""An environment of its own for every peer, made once for each list of pinned versions.

Peers want other versions of NumPy and transformers than phi4edge and than each other. ``peers/<tool>.txt`` pins
everything that a tool needs; its environment lies in ``$XDG_CACHE_HOME/phi4edge/environments/<tool>-<hash of the
list>`` and is shared by all clones. A tool without a list runs in the environment of phi4edge.

    python benchmarks/quality/environments.py            # make all
    python benchmarks/quality/environments.py autoround  # prints the path of its Python
"""

from __future__ import annotations

__all__ = ["TOOLS", "environment", "requirements"]

import argparse
import hashlib
import os
import platform
import re
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

PEERS = Path(__file__).resolve().parent / "peers"
TOOLS = ("gptqmodel_gptq", "autoround", "llm_compressor", "ort_genai")
BUILD = ["pip==26.3", "setuptools==84.2.1", "wheel==0.48.0", "ninja==1.13.2", "packaging==26.3"]
DONE = "installed"


def requirements(tool: str) -> Path | None:
    """The pinned list of ``tool``; None where it runs in phi4edge's environment."""
    path = PEERS / f"{tool}.txt"
    return path if path.is_file() else None


def folder(tool: str, text: str, variables: Mapping[str, str]) -> Path:
    """Where the environment of ``tool`` with the list ``text`` lies."""
    cache = Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = f"{platform.system()}-{platform.machine()}-{sys.version_info[0]}.{sys.version_info[1]}".lower()
    digest = hashlib.sha256("\n".join([text, *BUILD]).encode()).hexdigest()[:12]
    return cache / "phi4edge" / "environments" / f"{tool}-{kind}-{digest}"


def steps(text: str) -> list[list[str]]:
    """What pip installs, one step after another: torch comes before those whose build looks at it."""
    pins = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    torch = [pin for pin in pins if re.match(r"torch==", pin)]
    return [BUILD, torch, ["--no-build-isolation", *pins]]


def environment(tool: str) -> Path:
    """The Python that runs ``tool``, its environment made when it is not there yet.

    Raises:
        SystemExit: pip failed; its last lines are shown.
    """
    listed = requirements(tool)
    if listed is None:
        return Path(sys.executable)
    text = listed.read_text(encoding="utf-8")
    place = folder(tool, text, os.environ)
    python, done = place / "bin" / "python", place / DONE
    if done.is_file():
        return python
    print(f"installing {tool} into {place} (minutes, once)", file=sys.stderr)
    venv.create(place, with_pip=True, symlinks=True, clear=True)
    variables = {**os.environ, "BUILD_CUDA_EXT": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for step in steps(text):
        command = [str(python), "-m", "pip", "install", "--quiet", *step]
        ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if ran.returncode:
            tail = "\n".join(ran.stderr.strip().splitlines()[-15:])
            sys.exit(f"{tool}: pip install {' '.join(step)[:200]} failed\n{tail}")
    done.touch()
    return python


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", choices=[*TOOLS, []], metavar="TOOL", help="default: all")
    for tool in parser.parse_args().tools or TOOLS:
        print(environment(tool))


if __name__ == "__main__":
    main()
