"""The optimizer's state between steps of tuning: in RAM between commits, or on disk after every block.

RUN/tuning/state-000042/   θ and moments of every block after step 42: the last committed step, and the best one
RUN/tuning/state-next/     what the step in work has moved so far, where states are on disk
"""

from __future__ import annotations

__all__ = ["TUNING", "TuningStates", "best_step", "cost", "put_tensors", "score", "total_cost"]

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from phi4edge.core.atomic import fsync_directory, write_bytes
from phi4edge.core.hashing import sha256_file
from phi4edge.core.memory import peak_rss_bytes
from phi4edge.core.workdir import Workdir

TUNING = "tuning"  # a run's folder for it


def cost(seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def total_cost(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds added up, and the largest peak."""
    return {
        "seconds": sum(c["seconds"] for c in costs),
        "peak_rss_bytes": max((c["peak_rss_bytes"] for c in costs), default=0),
    }


def put_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    write_bytes(path, save({name: values.contiguous() for name, values in tensors.items()}))
    return path.name


def score(heldout: dict[str, dict[str, Any]]) -> float:
    """What the best state is chosen by: the geometric mean over domains."""
    return sum(math.log(max(v["kld"], 1e-12)) for v in heldout.values()) / len(heldout)


def best_step(records: list[dict[str, Any]]) -> int:
    """The step whose held-out figures are best; the earlier one of equals."""
    evaluated = [record for record in records if "heldout" in record]
    return int(min(evaluated, key=lambda record: (score(record["heldout"]), record["step"]))["step"])


class TuningStates:
    """θ and the optimizer's moments of every block: in RAM between commits, or on disk after every block."""

    def __init__(self, work: Workdir, layers: int, *, in_ram: bool) -> None:
        self.in_ram = in_ram
        self._work, self._layers = work, layers
        self._held: dict[int, dict[str, Tensor]] = {}
        self._folder: Path | None = None  # of the last commit; None: nothing was moved yet
        self._next = work.path / "state-next"

    def resume(self) -> int:
        """Take up the last committed step whose files are whole; what came after it is dropped."""
        shutil.rmtree(self._next, ignore_errors=True)
        steps = [(i, r) for i, r in enumerate(self._work.records) if "step" in r]
        for i, record in reversed(steps):
            if self._intact(record):
                if i + 1 < len(self._work.records):
                    self._work.drop_after(
                        i + 1, f"state of a later step is damaged; going on from step {record['step']}"
                    )
                self.go_to(record["step"])
                return int(record["step"])
        return 0

    def _intact(self, record: dict[str, Any]) -> bool:
        paths = {self._work.path / name: digest for name, digest in record["files"].items()}
        return all(path.is_file() and sha256_file(path) == digest for path, digest in paths.items())

    def go_to(self, step: int) -> None:
        """Take up the state that was committed at ``step``."""
        self._held = {}
        self._folder = self._work.path / f"state-{step:06d}" if step else None

    def load(self, layer: int) -> dict[str, Tensor]:
        """State of one block (``layers``: the final norm); empty before its first step."""
        if layer in self._held:
            return self._held[layer]
        name = f"{layer:05d}.safetensors"
        if (self._next / name).is_file():  # a finished step that is not committed yet
            return load_file(self._next / name)
        if self._folder is None:
            return {}
        found = load_file(self._folder / name)
        if self.in_ram:
            self._held[layer] = found
        return found

    def store(self, layer: int, state: dict[str, Tensor]) -> None:
        """The block's state after this step."""
        if self.in_ram:
            self._held[layer] = state
        else:
            put_tensors(self._next / f"{layer:05d}.safetensors", state)

    def commit(self, step: int, record: dict[str, Any], spent: Mapping[str, Any]) -> None:
        """Keep what was stored as the state after ``step``, and forget what no later process could want.

        ``spent`` is what it took since the commit before: seconds, peak_rss_bytes, parts.
        """
        files: list[str] = []
        if step:
            folder = self._work.path / f"state-{step:06d}"
            shutil.rmtree(folder, ignore_errors=True)
            if self.in_ram:
                for layer in range(self._layers + 1):
                    put_tensors(self._next / f"{layer:05d}.safetensors", self.load(layer))
            self._next.rename(folder)
            fsync_directory(self._work.path)
            self._folder = folder
            files = [f"{folder.name}/{layer:05d}.safetensors" for layer in range(self._layers + 1)]
        self._work.commit({"step": step, **record, "performance": dict(spent)}, files)
        self._drop_old(step)

    def _drop_old(self, step: int) -> None:
        best = best_step(self._work.records)
        for folder in self._folders():
            if folder.name not in (f"state-{step:06d}", f"state-{best:06d}"):
                shutil.rmtree(folder)

    def clear(self) -> None:
        """The result is written: no state is needed any more."""
        for folder in self._folders():
            shutil.rmtree(folder)

    def _folders(self) -> Iterator[Path]:
        return self._work.path.glob("state-*")
