"""A worker that gives another number of rows than it was asked for is found out, not waited for."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phi4edge.runtimes import _serving


class Faulty:
    """An engine whose pieces of logits have the rows that a test says."""

    vocab_size, load_s = 3, 0.0

    def __init__(self, rows: list[int]) -> None:
        self._rows = rows

    def details(self) -> dict[str, Any]:
        return {}

    def logits(self, tokens: list[int], first: int) -> Iterator[NDArray[np.float32]]:
        for count in self._rows:
            yield np.ones((count, self.vocab_size), dtype=np.float32)


def answers(rows: list[int]) -> list[dict[str, Any]]:
    """What the worker says when five tokens' logits are asked for from the second on, without the rows themselves."""
    requests = [{"op": "load"}, {"op": "logits", "tokens": [1, 2, 3, 4, 5], "first": 1}]
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
