"""The checkpoint's hashes, taken while its weights are rounded, from what is read for that.

Without data a run takes little longer than reading the checkpoint. So it begins with what is known of the files at
once, their folder, sizes and times, and goes from block to block as ever; the files are hashed meanwhile, as far as the
blocks are, and their hashes take the place of all that when they are known. A process that is killed before leaves a
run that the next one goes on with if nothing of it has changed, and whose files it hashes from their start.
"""

from __future__ import annotations

__all__ = ["HashBehind", "is_unsettled", "unsettled"]

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from phi4edge.checkpoint.fed_digest import FedDigest
from phi4edge.checkpoint.index import CheckpointIndex
from phi4edge.checkpoint.rows_ahead import segment_of
from phi4edge.core.errors import InputError
from phi4edge.core.jsonfile import read_object
from phi4edge.core.pagecache import outgrows_memory
from phi4edge.core.workdir import RUN_FILE
from phi4edge.stages.inputs import hashed_weights, known_hashes, remembered_hashes, stamps_of


def unsettled(inputs: Mapping[str, Any], index: CheckpointIndex) -> dict[str, Any]:
    """``inputs`` of a run whose checkpoint is not hashed yet.

    The folder is one of them: an archive may give all files of two models the same sizes and times.
    """
    folder = str(index.folder.resolve())
    return {**inputs, "checkpoint": None, "checkpoint_folder": folder, "checkpoint_stamps": stamps_of(index)}


def is_unsettled(run: Path) -> bool:
    """Whether ``run`` was begun and its checkpoint not hashed to the end."""
    if not (run / RUN_FILE).is_file():
        return False
    try:
        return "checkpoint_stamps" in read_object(run / RUN_FILE)["inputs"]
    except (InputError, KeyError, TypeError):  # damaged: who opens the run will say so
        return False


class HashBehind:
    """Hashes a checkpoint in the background.

    A context manager; at its end nothing is being read any more.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        run: Path,
        wanted: Sequence[tuple[str, slice]],
        settle: Callable[[dict[str, str]], None],
    ) -> None:
        """``wanted`` are the weights' rows that will be read and shown, in that order.

        ``settle`` is called once with the hashes, from the thread that calls :meth:`reached` or :meth:`wait`.
        """
        files = (*index.side_files, *index.shards)
        segments = [segment_of(index.tensors[name], rows) for name, rows in wanted]
        around_cache = outgrows_memory(index.nbytes)
        self.digest = FedDigest(files, hashed_weights(index), segments, around_cache=around_cache)
        self._settle, self._settled = settle, False
        self._thread = ThreadPoolExecutor(1, "hash-behind")
        self._hashes = self._thread.submit(self._hash, index, run)

    def reached(self) -> None:
        """Settle if everything is hashed.

        Raises:
            InputError: what was read of the checkpoint so far is not usable.
        """
        if self._hashes.done():
            self.wait()

    def wait(self) -> None:
        """Settle, when everything is hashed.

        Raises:
            InputError: the checkpoint is not usable.
        """
        hashes = self._hashes.result()
        if not self._settled:
            self._settle(hashes)
            self._settled = True

    def _hash(self, index: CheckpointIndex, run: Path) -> dict[str, str]:
        known = known_hashes(index, run)
        if known is not None:
            self.digest.stop()
            return known
        return remembered_hashes(index, self.digest.run)

    def __enter__(self) -> HashBehind:
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        self.digest.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
