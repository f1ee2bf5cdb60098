"""Rows of many weights in a known order, read from the disk a few pieces before they are asked for.

For weights that are used up as they come, by several threads. A piece is read in one go into one of a few buffers,
which is free for another once the piece has been used: memory that is new takes longer to come by than to fill. A
checkpoint that does not fit into memory is read around the page cache.
"""

from __future__ import annotations

__all__ = ["READ_AHEAD", "RowsAhead", "SomeRows", "segment_of"]

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi4edge.checkpoint.fed_digest import FedDigest, Segment
from phi4edge.checkpoint.index import TensorRef
from phi4edge.checkpoint.reader import CheckpointReader, finite_values, read_tensor
from phi4edge.core.direct_io import aligned_buffer

READ_AHEAD = 2  # pieces beside those in use, and as many requests that the disk has before it


@dataclass(frozen=True)
class SomeRows:
    """Rows of a weight, while they are open."""

    values: Callable[[slice], Tensor]  # some of them in float32, by their numbers; until others are asked for
    stored: Tensor  # all of them as they are stored; may hold what is not finite


@dataclass
class _Room:
    """Memory for one piece as stored, and for those of its rows that were asked for last."""

    stored: NDArray[np.uint8]
    values: Tensor


def segment_of(ref: TensorRef, rows: slice) -> Segment:
    """Where rows ``start:stop`` of a tensor lie."""
    row = ref.nbytes // ref.shape[0]
    return ref.path, ref.offset + rows.start * row, ref.offset + rows.stop * row


class RowsAhead:
    """Pieces of a checkpoint's weights, for ``users`` threads that ask for them about in their order.

    A context manager; at its end nothing is being read any more.
    """

    def __init__(
        self,
        checkpoint: CheckpointReader,
        wanted: Sequence[tuple[str, slice]],
        users: int,
        digest: FedDigest | None = None,
    ) -> None:
        """``wanted`` are tensors' names and rows ``start:stop``, in the order in which they will be asked for.

        ``digest`` is shown every piece; it knows of them.
        """
        self._digest = digest
        self._checkpoint, self._wanted, self._next = checkpoint, wanted, 0
        self._around_cache = checkpoint.outgrows_memory
        segments = (segment_of(checkpoint.place(name), rows) for name, rows in wanted)
        largest = max((stop - start for _, start, stop in segments), default=0)
        self._free = [_Room(aligned_buffer(largest), torch.empty(0)) for _ in range(users + READ_AHEAD)]
        self._coming: dict[tuple[str, int], tuple[_Room, Future[Tensor]]] = {}
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(READ_AHEAD, "read")
        self._ask()

    @contextmanager
    def piece(self, name: str, rows: slice) -> Iterator[SomeRows]:
        """These ``rows`` of a weight.

        Raises:
            InputError: the file ends early or cannot be read, here; a value is NaN or Inf, as its row's are asked for.
        """
        with self._lock:
            room, future = self._coming.pop((name, rows.start))
        stored, ref = future.result(), self._checkpoint.place(name)
        assert len(stored) == rows.stop - rows.start, f"other rows of {name} were announced"

        def some(part: slice) -> Tensor:
            asked = stored[part.start - rows.start : part.stop - rows.start]
            if room.values.numel() < asked.numel():
                room.values = torch.empty(asked.numel())
            return finite_values(ref, asked, part.start, room.values[: asked.numel()].view_as(asked))

        try:
            yield SomeRows(some, stored)
        finally:
            if self._digest is not None:
                self._digest.release(*segment_of(ref, rows)[:2])
            with self._lock:
                self._free.append(room)
        self._ask()

    def __enter__(self) -> RowsAhead:
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        self._readers.shutdown(cancel_futures=True)

    def _ask(self) -> None:
        """Have pieces read into all buffers that are free."""
        with self._lock:
            while self._free and self._next < len(self._wanted):
                name, rows = self._wanted[self._next]
                self._next += 1
                room = self._free.pop()
                if self._digest is not None:
                    self._digest.coming(*segment_of(self._checkpoint.place(name), rows)[:2])
                self._coming[name, rows.start] = room, self._readers.submit(self._read, name, rows, room)

    def _read(self, name: str, rows: slice, room: _Room) -> Tensor:
        ref = self._checkpoint.place(name)
        path, start, _ = segment_of(ref, rows)
        try:
            stored = read_tensor(ref, rows, around_cache=self._around_cache, into=room.stored)
        except BaseException:
            if self._digest is not None:
                self._digest.release(path, start)  # it would wait for what never comes
            raise
        if self._digest is not None:
            self._digest.show(path, start, stored.reshape(-1).view(torch.uint8).numpy().data)
        return stored
