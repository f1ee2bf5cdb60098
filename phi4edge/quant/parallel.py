"""Independent pieces of work side by side, each on one core.

Work on a few hundred rows is too small to be split inside an operation: the threads of a pool would wait for each
other after every one. So pieces are given to Python threads (torch releases the GIL while it computes), each of which
computes on one core. What comes out does not depend on how many there are.
"""

from __future__ import annotations

__all__ = ["SMALL_PIECE", "RunPieces", "read_pieces", "row_pieces", "run_ahead", "run_parallel"]

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Something that computes pieces: here, or elsewhere. They are functions of their arguments, found by name.
RunPieces = Callable[[Sequence[partial[Any]]], list[Any]]
_MOST_ROWS, _FEWEST_ROWS, _WEIGHTS = 4096, 512, 2**22  # in a piece
_READ = 2**21  # weights read at a time
_UNDIVIDED = 1024  # rows that stay one piece
SMALL_PIECE = 2**20  # weights of a piece of work that needs several values for each of them


def row_pieces(rows: int, columns: int, most: int | None = None) -> list[slice]:
    """The rows of a matrix [rows, columns] in one piece, or an even number of about one size, at most ``most`` in each.

    Every piece walks over all columns, and what is in work beside the weight is as large as pieces are: from 512 rows
    on a walk takes within a tenth of what it does with thousands. They depend on the shape alone, so what is computed
    does not on the machine.
    """
    if most is None and rows <= _UNDIVIDED:
        most = rows
    elif most is None:
        most = max(_FEWEST_ROWS, min(_MOST_ROWS, _WEIGHTS // columns))
        pairs = -(-rows // (2 * most))
        most = -(-rows // (2 * pairs))
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]


def read_pieces(rows: int, columns: int, most: int | None = None) -> list[slice]:
    """Rows of a weight that is rounded as it is read: what a disk gives in one go, or ``most`` in each piece."""
    return row_pieces(rows, columns, most or max(1, _READ // columns))


def run_parallel(pieces: Sequence[Callable[[], T]]) -> list[T]:
    """Results of ``pieces``, in order, computed on as many cores as torch was given."""
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def run(piece: Callable[[], T]) -> T:
        with torch.inference_mode(inference):
            return piece()

    try:
        torch.set_num_threads(1)
        if threads == 1 or len(pieces) == 1:
            return [piece() for piece in pieces]
        futures = [_pool(os.getpid(), threads).submit(run, piece) for piece in pieces]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
    finally:
        torch.set_num_threads(threads)


def run_ahead(pieces: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """The same, as they are asked for: one more than there are cores is made meanwhile, and no more are in RAM.

    An error in a piece is raised where its result would have come. Closed early, no piece is being computed any more.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    pool, coming = _pool(os.getpid(), threads), deque[Future[T]]()

    def run(piece: Callable[[], T]) -> T:
        with torch.inference_mode(inference):
            return piece()

    try:
        for piece in pieces:
            coming.append(pool.submit(run, piece))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()
        wait(coming)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of this process, kept: some pieces take little longer than it takes to start one."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
