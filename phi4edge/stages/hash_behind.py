"""The checkpoint's hashes, taken while its weights are rounded: reading it once more need not come first.

Without data a run takes little longer than reading the checkpoint. So it begins with what is known of the files at
once, their sizes and times, and goes from block to block as ever; the files are hashed meanwhile, as far as the blocks
are, and their hashes take the place of sizes and times when all are known. A process that is killed before leaves a run
that the next one goes on with if sizes and times are the same, and whose files it hashes from their start.
"""

from __future__ import annotations

__all__ = ["HashBehind", "is_unsettled", "unsettled"]

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from phi4edge.checkpoint.digest import Gate
from phi4edge.checkpoint.index import CheckpointIndex
from phi4edge.core.errors import InputError
from phi4edge.core.jsonfile import read_object
from phi4edge.core.workdir import RUN_FILE
from phi4edge.stages.inputs import hash_checkpoint, stamps_of

_AHEAD = 2  # blocks that hashing is ahead of rounding


def unsettled(inputs: Mapping[str, Any], index: CheckpointIndex) -> dict[str, Any]:
    """``inputs`` of a run whose checkpoint is not hashed yet."""
    return {**inputs, "checkpoint": None, "checkpoint_stamps": stamps_of(index)}


def is_unsettled(run: Path) -> bool:
    """Whether ``run`` was begun and its checkpoint not hashed to the end."""
    if not (run / RUN_FILE).is_file():
        return False
    try:
        return "checkpoint_stamps" in read_object(run / RUN_FILE)["inputs"]
    except (InputError, KeyError, TypeError):  # damaged: who opens the run will say so
        return False


class HashBehind:
    """Hashes a checkpoint in the background of ``blocks`` blocks' work.

    A context manager; at its end nothing is being read any more.
    """

    def __init__(self, index: CheckpointIndex, run: Path, settle: Callable[[dict[str, str]], None]) -> None:
        """``settle`` is called once with the hashes, from the thread that calls :meth:`reached` or :meth:`wait`."""
        self._gate, self._settle, self._settled = Gate(), settle, False
        self._thread = ThreadPoolExecutor(1, "hash-behind")
        self._hashes: Future[dict[str, str]] = self._thread.submit(hash_checkpoint, index, run, self._gate)

    def reached(self, done: int, blocks: int) -> None:
        """So many of ``blocks`` blocks are done.

        Raises:
            InputError: what is read of the checkpoint so far is not usable.
        """
        self._gate.open_to((done + _AHEAD) / blocks)
        if self._hashes.done():
            self.wait()

    def wait(self) -> None:
        """Settle, when everything is hashed.

        Raises:
            InputError: the checkpoint is not usable.
        """
        self._gate.open_to(1.0)
        hashes = self._hashes.result()
        if not self._settled:
            self._settle(hashes)
            self._settled = True

    def __enter__(self) -> HashBehind:
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        self._gate.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
