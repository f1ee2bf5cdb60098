"""One step ahead: what an iterator gives next is made in a thread while this one uses what it gave last.

For work that leaves Python's lock alone most of the time (tensor arithmetic, reading, writing, hashing). The thread is
at most one item ahead, so two are in RAM, and a third (:data:`IN_RAM`) while it waits to hand one over.
"""

from __future__ import annotations

__all__ = ["IN_RAM", "ahead"]

import threading
from collections.abc import Generator, Iterable
from queue import Empty, Full, Queue
from typing import TypeVar

T = TypeVar("T")
IN_RAM = 3  # items that are in use, wait, or are being made; the fourth is begun when the first is done with
_PATIENCE_S = 0.1  # between two looks at whether the other side gave up


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The same items in the same order; an error in ``items`` is raised where its item would have come."""
    handed: Queue[tuple[bool, T | BaseException | None]] = Queue(maxsize=1)
    given_up = threading.Event()

    def hand(entry: tuple[bool, T | BaseException | None]) -> bool:
        while not given_up.is_set():
            try:
                handed.put(entry, timeout=_PATIENCE_S)
            except Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not hand((True, item)):
                    return
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits for the item
            hand((False, error))
            return
        hand((False, None))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                more, entry = handed.get(timeout=_PATIENCE_S)
            except Empty:
                assert thread.is_alive() or not handed.empty(), "the thread ended without a word"
                continue
            if more:
                yield entry  # type: ignore[misc]  # an item, by its flag
            elif entry is None:
                return
            else:
                raise entry  # type: ignore[misc]
    finally:
        given_up.set()
        thread.join()
