"""Candidates: rows of ``candidates.toml``, and the artifact that each makes of a model and the shared chunks.

An artifact is made once for what decides it: the model's files, the tokens, the row, and the tool's versions and
script, or phi4edge's source. Every process writes a log beside its artifact. Costs are those of the tool's own work:
a peer's script measures itself, ours is the whole `phi4edge` process (and `phi4edge calibrate` for llama.cpp's
imatrix), processor seconds and peak RSS as the kernel counts them.
"""

from __future__ import annotations

__all__ = ["Candidate", "Made", "Work", "build", "load_candidates"]

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from environments import TOOLS, environment, requirements  # noqa: E402
from launch import launch  # noqa: E402

from phi4edge.core.atomic import write_json  # noqa: E402
from phi4edge.core.errors import InputError  # noqa: E402
from phi4edge.core.hashing import sha256_file, sha256_json  # noqa: E402
from phi4edge.core.settings import Table, read_toml  # noqa: E402

LLAMA = ROOT / "benchmarks" / "peers" / "llama_quantize.py"
CHUNKS = "{chunks}"  # in a candidate's arguments: the file of the shared chunks
ARTIFACTS = {"gguf": "model.gguf", "run": "run", "checkpoint": "checkpoint"}
DECIDES_NOTHING = ("report", "targets", "transports", "measurement", "runtimes")  # layers that make no artifact


@dataclass(frozen=True)
class Candidate:
    """One row of the table."""

    name: str
    tool: str  # llama, phi4edge, or a script in peers/
    grid: str  # rows with the same grid are held against each other
    format: str  # gguf, run or checkpoint
    arguments: tuple[str, ...] = ()
    slow: bool = False  # only made when asked for
    scheme: str | None = None  # of ours, where the grid's name is none
    same_size_as: str | None = None  # of ours: a mix whose tensors take at most the bytes of that row's

    @property
    def ours(self) -> bool:
        """Whether it is phi4edge's."""
        return self.tool == "phi4edge"

    @property
    def folder(self) -> str:
        """A name that every file system takes."""
        return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in self.name.lower()).split())


@dataclass(frozen=True)
class Made:
    """An artifact with what it cost; ``key`` says what it was made of."""

    path: Path
    key: str
    nbytes: int | None  # of the file; None for weights that were multiplied out
    cost: Mapping[str, float | int]  # wall_seconds, cpu_seconds, peak_rss_bytes
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """A model, the chunks for it, and the folder where everything made of both lies."""

    model: Path
    chunks: Path
    samples: int
    length: int
    folder: Path

    @cached_property
    def key(self) -> str:
        """What every artifact is made of."""
        files = sorted(p for p in self.model.iterdir() if p.is_file())
        return sha256_json({"chunks": sha256_file(self.chunks), **{p.name: sha256_file(p) for p in files}})


def load_candidates(path: Path) -> list[Candidate]:
    """The rows of a candidates file, in its order.

    Raises:
        InputError: an unknown key, tool or format, or a name that stands there twice.
    """
    known = ("name", "tool", "grid", "format", "arguments", "slow", "scheme", "same_size_as")
    rows = Table(read_toml(path), ("candidate",), str(path)).tables("candidate", known, required=True)
    found = [
        Candidate(
            row.string("name"),
            row.choice("tool", ("llama", "phi4edge", *TOOLS)),
            row.string("grid"),
            row.choice("format", tuple(ARTIFACTS)),
            tuple(row.data.get("arguments", ())),
            row.boolean("slow", False),
            row.string("scheme") if "scheme" in row else None,
            row.string("same_size_as") if "same_size_as" in row else None,
        )
        for row in rows
    ]
    for number, candidate in enumerate(found):
        if candidate.folder in {other.folder for other in found[:number]}:
            raise InputError(f"{path}: names {candidate.name!r} twice")
    return found


def child(command: Sequence[str | Path], log: Path, cache: Path | None = None) -> dict[str, float | int]:
    """Run ``command`` in ``log``'s folder, its output appended to ``log``; what it and its children cost.

    Wall and processor seconds, and the largest resident set of any of them. ``cache`` is phi4edge's, if not the user's.

    Raises:
        SystemExit: it failed; the end of the log is shown.
    """
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables.pop("PYTHONPATH", None)
    if command[0] == sys.executable:  # this clone's phi4edge, whichever is installed; peers see nothing of it
        variables["PYTHONPATH"] = str(ROOT)
    if cache is not None:
        variables["PHI4EDGE_CACHE"] = str(cache)
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        ran = launch(words, env=variables, cwd=log.parent, output=file)
    if ran.code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        sys.exit(f"{' '.join(words[:4])} … ended with {ran.code}; {log}:\n{tail}")
    return {"wall_seconds": ran.seconds, "cpu_seconds": ran.cpu_seconds, "peak_rss_bytes": ran.peak_rss_bytes}


def added(costs: Sequence[Mapping[str, float | int]]) -> dict[str, float | int]:
    """Costs of processes that run one after another."""
    return {
        "wall_seconds": sum(cost["wall_seconds"] for cost in costs),
        "cpu_seconds": sum(cost["cpu_seconds"] for cost in costs),
        "peak_rss_bytes": max(cost["peak_rss_bytes"] for cost in costs),
    }


def phi4edge(*words: str | Path) -> list[str | Path]:
    """A phi4edge command."""
    return [sys.executable, "-m", "phi4edge", *words]


def source_hash() -> str:
    """Of the part of phi4edge that decides what an artifact holds."""
    paths = sorted(p for p in (ROOT / "phi4edge").rglob("*.py"))
    digest = hashlib.sha256()
    for path in paths:
        if path.relative_to(ROOT / "phi4edge").parts[0] not in DECIDES_NOTHING:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def tool_state(candidate: Candidate) -> Any:
    """Versions and scripts that decide what a candidate's tool makes."""
    if candidate.ours:
        return source_hash()
    if candidate.tool == "llama":
        return [version("llama-cpp-python"), sha256_file(LLAMA)]
    listed = requirements(candidate.tool)
    scripts = [f"{candidate.tool}.py", "dequantized.py", "packed_gptq.py"]
    pins = listed.read_text(encoding="utf-8") if listed else version("onnxruntime-genai")
    return [pins, *(sha256_file(HERE / "peers" / script) for script in scripts)]


def corpus(work: Work) -> list[str | Path]:
    """The flags that give a phi4edge command the shared chunks."""
    return ["--corpus", work.chunks, "--samples", str(work.samples), "--sequence-length", str(work.length)]


def float_gguf(work: Work) -> Path:
    """The model as a float16 GGUF, llama.cpp's source."""
    path = work.folder / "f16.gguf"
    if not path.is_file():
        export = phi4edge("export", work.model, "--format", "gguf", "--out", path, "--force", "--quiet")
        child(export, work.folder / "f16.log")
    return path


def imatrix(work: Work) -> tuple[Path, dict[str, Any]]:
    """The imatrix of the shared chunks and what measuring it cost."""
    run, note = work.folder / "imatrix", work.folder / "imatrix.json"
    path = run / "calibration" / "imatrix.safetensors"
    state = sha256_json([work.key, source_hash()])
    if not note.is_file() or json.loads(note.read_text())["key"] != state:
        command = phi4edge("calibrate", work.model, "--out", run, *corpus(work), "--restart", "--quiet")
        write_json(note, {"key": state, "cost": child(command, work.folder / "imatrix.log")})
    return path, json.loads(note.read_text())["cost"]


def make_llama(candidate: Candidate, work: Work, artifact: Path, log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """llama.cpp's own quantizer on the float16 GGUF."""
    source, costs = float_gguf(work), []
    command = [sys.executable, LLAMA, source, artifact, "--type", candidate.grid]
    if "--imatrix" in candidate.arguments:
        path, cost = imatrix(work)
        command += ["--imatrix", path]
        costs.append(cost)
    costs.append(child(command, log))
    return added(costs), {"versions": {"llama-cpp-python": version("llama-cpp-python")}}


def make_ours(candidate: Candidate, work: Work, artifact: Path, log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """phi4edge quantize, and export where a file is measured."""
    run = artifact.with_name("run")
    begun = run.exists()  # and ended before it was whole: what it cost until then is not known
    quantize = phi4edge("quantize", work.model, "--out", run, *corpus(work))
    quantize += [word.replace(CHUNKS, str(work.chunks)) for word in candidate.arguments]
    if candidate.same_size_as is not None:
        quantize += ["--target-size", str(tensor_bytes(work.folder / candidate.same_size_as / ARTIFACTS["gguf"]))]
    else:
        quantize += ["--scheme", candidate.scheme or candidate.grid]
    cost = child([*quantize, "--quiet"], log, artifact.with_name("cache"))  # an empty one: all it takes is paid for
    if candidate.format == "gguf":
        child(phi4edge("export", run, "--format", "gguf", "--out", artifact, "--force", "--quiet"), log)
    events = json.loads((run / "manifest.json").read_text())["data"]["events"]
    fallbacks = sum(event["kind"] == "fallback_to_rtn" for event in events)
    return cost, {"fallbacks_to_rtn": fallbacks, "resumed": begun}


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF.

    Raises:
        SystemExit: it was not made yet.
    """
    if not path.is_file():
        sys.exit(f"{path} is not there: the row that gives the size has to be made first")
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def make_peer(candidate: Candidate, work: Work, artifact: Path, log: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A peer's script in the peer's environment."""
    script = HERE / "peers" / f"{candidate.tool}.py"
    command = [environment(candidate.tool), script, work.model, work.chunks, artifact, "--scheme", candidate.grid]
    child([*command, *candidate.arguments], log)
    facts = json.loads((artifact / "peer.json").read_text())
    return facts.pop("cost"), facts


def build(candidate: Candidate, work: Work) -> Made:
    """The candidate's artifact, made unless the one that is there is made of the same.

    Raises:
        SystemExit: a process failed; the end of its log is shown.
    """
    asked = asdict(candidate).items()  # a column that a row leaves out is no part of its key
    row = {key: value for key, value in asked if value is not None and key not in ("name", "slow")}
    key = sha256_json([work.key, row, tool_state(candidate)])
    folder = work.folder / candidate.folder
    artifact, note, begun = folder / ARTIFACTS[candidate.format], folder / "made.json", folder / "begun.json"
    if not note.is_file() or json.loads(note.read_text())["key"] != key:
        print(f"{work.folder.name}: making {candidate.name}", file=sys.stderr, flush=True)
        if not begun.is_file() or json.loads(begun.read_text()) != key:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(begun, key)
        make = {"llama": make_llama, "phi4edge": make_ours}.get(candidate.tool, make_peer)
        cost, facts = make(candidate, work, artifact, folder / "log.txt")
        nbytes = artifact.stat().st_size if artifact.is_file() else None
        write_json(note, {"key": key, "nbytes": nbytes, "cost": cost, "facts": facts})
    return Made(artifact, **json.loads(note.read_text()))
