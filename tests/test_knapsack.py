"""Bit allocation's knapsack is exact, and says so when it is not."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4edge.quant import knapsack
from phi4edge.quant.knapsack import Option, choose_options

OPTIONS = st.lists(
    st.builds(Option, st.just("t"), st.integers(1, 40).map(lambda n: n * 6), st.floats(0, 10)), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 1200))
def test_choice_is_the_best_of_all(tensors: list[list[Option]], budget: int) -> None:
    combinations = [c for c in product(*tensors) if sum(o.nbytes for o in c) <= budget]
    found = choose_options(tensors, budget)
    if not combinations:
        assert found is None
        return
    assert found is not None
    assert found.nbytes <= budget
    assert found.slack == 0
    assert found.cost == pytest.approx(min(sum(o.cost for o in c) for c in combinations))


def test_a_table_too_large_is_coarsened_and_says_what_it_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [[Option("a", 1000 + i, 1.0), Option("b", 1700 + 3 * i, 0.1 * i)] for i in range(12)]
    exact = choose_options(tensors, 16_001)
    monkeypatch.setattr(knapsack, "_STATES", 50)
    coarse = choose_options(tensors, 16_001)
    assert exact is not None
    assert coarse is not None
    assert exact.slack == 0 < coarse.slack
    assert coarse.nbytes <= 16_001
    assert exact.cost <= coarse.cost
    monkeypatch.undo()
    within = choose_options(tensors, 16_001 - coarse.slack)
    assert within is None or coarse.cost <= within.cost
