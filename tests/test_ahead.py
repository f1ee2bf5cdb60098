"""What is made ahead comes in order, its errors come in their place, and a thread that nobody waits for ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from phi4edge.core.ahead import ahead


def threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def test_items_come_in_order_and_at_most_two_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    for expected, item in enumerate(ahead(items())):
        assert item == expected
        assert len(made) <= item + 3  # the one in use, the one that waits, the one being handed over
    assert made == list(range(20))
    assert threads() == 0


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    begun = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        begun.set()
        yield 1

    found = ahead(items())
    assert next(found) == 0
    assert begun.wait(timeout=60)  # without anyone asking for it
    assert list(found) == [1]


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)
    assert threads() == 0


def test_whoever_stops_early_leaves_no_thread_behind() -> None:
    found = ahead(range(1000))
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]
    assert threads() == 0
