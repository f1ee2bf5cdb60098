"""What Numba compiles runs as well where there is no place to keep it."""

from __future__ import annotations

import numba.core.caching as caching
import numpy as np
import pytest

from phi4edge.core.compiled import compiled


def halves(values: np.ndarray) -> float:
    """The sum of the halves of ``values``, and of 1 / 0."""
    total = 0.0
    for value in values:
        total += value / 2
    return total + 1.0 / (values[0] - values[0])


def test_it_runs_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        caching.FunctionCache(halves)
    assert compiled(halves)(np.array([1.0, 2.0])) == np.inf
