"""One process of the soak from its start to its end or its death, and what it leaves on disk."""

from __future__ import annotations

__all__ = ["Life", "Place", "outcome"]

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from soak_child import Order, live

from phi4edge.core.workdir import JOURNAL
from phi4edge.model.block import LINEARS

_POLL = 0.01  # seconds
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [f"phi4edge.{name}" for name in ("cli.main", "cli.commands.quantize", "cli.commands.export", "stages.quantize")]
    + ["phi4edge.stages.export", "phi4edge.solvers.gptq", "phi4edge.writers.gguf", "soak_child"]
)


def committed(run: Path) -> int:
    """Steps that a journal holds whole: blocks of a run."""
    return len(_records(run / JOURNAL))


def committed_step(run: Path) -> int:
    """The last step of tuning that was committed."""
    return max((record.get("step", 0) for record in _records(run / "tuning" / JOURNAL)), default=0)


def _records(journal: Path) -> list[dict[str, Any]]:
    if not journal.is_file():
        return []
    found = []
    for line in journal.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(json.loads(line)["record"])
        except (ValueError, KeyError):
            break
    return found


def outcome(run: Path, artifact: Path) -> dict[str, str]:
    """SHA-256 of all that a finished run and its artifact hold, but for what it cost and which process committed when.

    A journal counts without seconds and RSS; tuning's, which also says how many steps were committed at a time, by
    its losses and held-out figures in order.
    """
    found = {"artifact": hashlib.sha256(artifact.read_bytes()).hexdigest()}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if name == "performance.json":
            continue
        data = path.read_bytes()
        if path.name == JOURNAL:
            records = [{k: v for k, v in r.items() if k != "performance"} for r in _records(path)]
            told: Any = records
            if name.startswith("tuning"):
                losses = [loss for record in records for loss in record.get("losses", [])]
                told = [losses, [r["heldout"] for r in records if "heldout" in r], records[-1]]
            data = json.dumps(told).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@dataclass
class Life:
    """What one process did, by its log."""

    code: int  # of its exit; negative: the signal that ended it
    blocks: list[int] = field(default_factory=list)  # begun, in order
    finished: int = 0  # blocks that were committed while it lived
    linears: int = 0  # solved
    tuned_from: int | None = None  # the step that tuning went on from
    steps: int = 0  # of tuning, finished
    steps_committed: int = 0
    notes: list[str] = field(default_factory=list)  # what was repaired, in the run's own words
    operations: int = 0  # on files, where it came to its end
    message: str = ""  # its error

    @property
    def redone(self) -> float:
        """Blocks' worth of solved linears that it did not bring to a commit: the next process does them again."""
        return self.linears / len(LINEARS) - self.finished


@dataclass
class Place:
    """Where one run of the soak lies, and the command that is started there until it is finished."""

    folder: Path  # holds run and artifact, on a file system that may be small
    logs: Path  # elsewhere
    arguments: Sequence[str]  # of quantize: the model, then options
    spilling: bool = False  # activations and states live in files
    limit: int | None = None  # bytes that a file may have, by RLIMIT_FSIZE

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """What the process that lives or lived last began."""
        return self.logs / "life.log"

    @property
    def errors(self) -> Path:
        """What it said on stderr."""
        return self.logs / "errors.txt"

    @property
    def artifact(self) -> Path:
        """The exported file."""
        return self.folder / "model.gguf"

    def start(self, stop: int = 0, extra: Sequence[str] = ()) -> ForkServerProcess:
        """Start the process; before its ``stop``-th operation on a file it kills itself."""
        self.log.unlink(missing_ok=True)
        arguments = (*map(str, self.arguments), *extra)
        order = Order(self.log, self.errors, self.run, self.artifact, arguments, stop, self.spilling, self.limit)
        child = _SERVER.Process(target=live, args=(order,))
        child.start()
        return child

    def live(
        self,
        *,
        kill: Callable[[list[str], float], bool] | None = None,
        stop: int = 0,
        extra: Sequence[str] = (),
        meanwhile: Callable[[list[str]], None] | None = None,
    ) -> Life:
        """Start the process and see it to its end.

        ``kill`` is asked, with the lines of its log and the seconds since the first, whether it dies now (SIGKILL);
        ``meanwhile`` is told of the lines.
        """
        before, step_before = committed(self.run), committed_step(self.run)
        child = self.start(stop, extra)
        began: float | None = None
        while child.is_alive():
            lines = _lines(self.log)
            if lines and began is None:
                began = time.monotonic()
            if meanwhile is not None:
                meanwhile(lines)
            if kill is not None and began is not None and kill(lines, time.monotonic() - began):
                child.kill()
                break
            time.sleep(_POLL)
        child.join()
        assert child.exitcode is not None
        life = _read(_lines(self.log), child.exitcode, self.errors.read_text() if self.errors.exists() else "")
        from_block = life.blocks[0] if life.blocks else before
        from_step = step_before if life.tuned_from is None else life.tuned_from
        life.finished = max(0, committed(self.run) - from_block)
        life.steps_committed = max(0, committed_step(self.run) - from_step)
        return life


def _lines(log: Path) -> list[str]:
    return log.read_text().split("\n")[:-1] if log.is_file() else []


def _read(lines: list[str], code: int, errors: str) -> Life:
    life, stage = Life(code), ""
    for line in lines:
        kind, _, rest = line.partition(" ")
        words = rest.split()
        if kind == "start":
            stage = words[0]
            if stage == "tune":
                life.tuned_from = int(words[1])
        elif kind == "status" and stage == "quantize" and words[0] == "block":
            if not life.blocks or life.blocks[-1] != int(words[1]):
                life.blocks.append(int(words[1]))
        elif kind == "advance" and stage == "quantize":
            life.linears += int(words[0])
        elif kind == "advance" and stage == "tune":
            life.steps += int(words[0])
        elif kind == "note":
            life.notes.append(rest)
        elif kind == "end":
            life.operations = int(words[1])
    told = [line for line in errors.splitlines() if line.startswith("Error")]
    life.message = told[0] if told else ""
    return life
