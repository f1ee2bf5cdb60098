"""Logits come as they were made, over the pipe and in shared memory; another number of rows than asked is found out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phi4edge.runtimes import _serving
from phi4edge.runtimes._shared import SharedRows


class Faulty:
    """An engine whose pieces of logits have the rows that a test says."""

    vocab_size, load_s = 3, 0.0

    def __init__(self, rows: list[int]) -> None:
        self._rows = rows

    def details(self) -> dict[str, Any]:
        return {}

    def logits(self, tokens: list[int], first: int) -> Iterator[NDArray[np.float32]]:
        for count in self._rows:
            yield np.full((count, self.vocab_size), tokens[0], dtype=np.float32)


def answers(rows: list[int], load: dict[str, Any] | None = None, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What the worker says when five tokens' logits are asked for from the second on, without the rows themselves."""
    asked = asked or ({},)
    requests = [{"op": "load", **(load or {})}]
    requests += [{"op": "logits", "tokens": [n, 2, 3, 4, 5], "first": 1, **each} for n, each in enumerate(asked, 1)]
    given = io.BytesIO(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
    out = io.BytesIO()
    _serving._serve(given, out, lambda request: Faulty(rows), lambda: None, None)
    out.seek(0)
    found = []
    while line := out.readline():
        found.append(json.loads(line))
        out.seek(found[-1].get("nbytes", 0), io.SEEK_CUR)
    return found[1:]


@pytest.mark.parametrize("rows", [[4], [1, 3], [1, 1, 1, 1]])
def test_the_rows_that_were_asked_for_are_given_and_nothing_else_is_said(rows: list[int]) -> None:
    assert answers(rows) == [{"ok": True, "nbytes": 12 * count} for count in rows]


@pytest.mark.parametrize(("rows", "words"), [([], "4 rows"), ([1, 2], "1 rows"), ([3, 2], "1 rows"), ([5], "1 rows")])
def test_too_few_and_too_many_rows_are_an_error(rows: list[int], words: str) -> None:
    last = answers(rows)[-1]
    assert (last["ok"], last["kind"]) == (False, "runtime")
    assert f"gave {words} of logits too {'few' if sum(rows) < 4 else 'many'}" in last["message"]


@pytest.mark.parametrize("rows", [[4], [1, 3]])
def test_rows_lie_in_shared_memory_and_stay_until_their_place_is_given_again(rows: list[int]) -> None:
    shared = SharedRows()
    places = [shared.place(48) for _ in range(3)]
    asked = [{"offset": offset, "size": size} for offset, size in places]
    assert places[0] == places[2] != places[1]
    assert answers(rows, {"shared": shared.descriptor}, *asked[:2]) == [{"ok": True}] * 2
    first, second = (shared.rows(offset, (4, 3)) for offset, _ in places[:2])
    assert (first == 1).all()
    assert (second == 2).all()
    answers(rows, {"shared": shared.descriptor}, *asked[2:])
    assert (first == 1).all()  # the same place, and the request's first token is 1 again
    shared.close()


def test_a_larger_request_makes_the_places_larger_on_both_sides() -> None:
    shared = SharedRows()
    small, large = shared.place(48), shared.place(48 * 2**12)
    asked = [{"offset": offset, "size": size} for offset, size in (small, large)]
    assert answers([4], {"shared": shared.descriptor}, *asked) == [{"ok": True}] * 2
    assert large[1] > small[1]
    assert (shared.rows(large[0], (4, 3)) == 2).all()
    shared.close()


@pytest.mark.parametrize("rows", [[1, 2], [5]])
def test_another_number_of_rows_is_an_error_in_shared_memory_too(rows: list[int]) -> None:
    shared = SharedRows()
    offset, size = shared.place(48)
    (said,) = answers(rows, {"shared": shared.descriptor}, {"offset": offset, "size": size})
    assert (said["ok"], said["kind"]) == (False, "runtime")
    shared.close()


def test_a_child_that_inherits_the_descriptor_writes_what_we_read() -> None:
    shared = SharedRows()
    offset, size = shared.place(16)
    code = "import mmap, sys, numpy; from phi4edge.runtimes._shared import copy_rows\n" + (
        "copy_rows(mmap.mmap(int(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3]), numpy.float32([[1, 2], [3, 4]]))"
    )
    arguments = [str(shared.descriptor), str(size), str(offset)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, pass_fds=(shared.descriptor,))
    assert shared.rows(offset, (2, 2)).tolist() == [[1, 2], [3, 4]]
    shared.close()
