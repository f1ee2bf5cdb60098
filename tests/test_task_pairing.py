"""Accuracies in pairs, against values worked out by hand or taken from the papers' own tables."""

from __future__ import annotations

import itertools
import math

import pytest

from phi4edge.core.errors import UsageError
from phi4edge.measurement.gates import Limits, gate_error
from phi4edge.measurement.tasks.pairing import Pairing, mcnemar, pair, paired_interval, wilson
from phi4edge.measurement.tasks.run import task_gates


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statist. Med. 17, 857 (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_cells_count_what_each_model_got_right() -> None:
    artifact = [True, False, True, False, False, True]
    reference = [True, True, False, False, True, True]
    cells = pair(artifact, reference)
    assert cells == Pairing(both=2, lost=2, gained=1, neither=1)
    assert cells.difference == pytest.approx(-1 / 6)
    found = cells.as_dict()
    assert (found["artifact"]["correct"], found["reference"]["correct"]) == (3, 4)
    assert found["flips"] == {"lost": 2, "gained": 1}


def test_error_of_the_difference_is_that_of_the_paired_differences() -> None:
    artifact, reference = [True] * 9 + [False] * 6, [True] * 6 + [False] * 3 + [True] * 4 + [False] * 2
    cells = pair(artifact, reference)
    differences = [int(q) - int(p) for q, p in zip(artifact, reference, strict=True)]
    mean = sum(differences) / 15
    assert cells.difference == pytest.approx(mean)
    assert cells.se == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in differences) / 15 / 15))


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe, Statist. Med. 17, 2635 (1998), table III, method 10
        ((0, 0, 0, 30), -0.1135, 0.1135),  # φ is 0 there: Wilson's bound of 0 in 30, either way
    ],
)
def test_interval_of_the_difference_is_the_published_one(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    both, first, second, neither = cells
    # There p1 is e + f and the difference e + f less e + g, which is the reference's loss.
    found = paired_interval(Pairing(both, first, second, neither))
    assert (-found[1], -found[0]) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize(("n", "p", "q", "shared"), [(40, 0.5, 0.4, 0.35), (120, 0.8, 0.75, 0.7)])
def test_interval_holds_the_true_difference_in_about_95_of_100_samples(
    n: int, p: float, q: float, shared: float
) -> None:
    import numpy as np

    probabilities = [shared, p - shared, q - shared, 1 - p - q + shared]
    draws = np.random.default_rng(5).multinomial(n, probabilities, size=2000)
    held = 0
    for draw in draws:
        low, high = paired_interval(Pairing(*map(int, draw)))
        held += low <= q - p <= high
    assert 0.93 < held / len(draws) < 0.985


def test_equal_answers_of_few_questions_prove_nothing_and_of_many_something() -> None:
    few, many = (paired_interval(Pairing(n, 0, 0, n)) for n in (3, 300))
    assert few[1] > 0.2
    assert many[1] < 0.02


@pytest.mark.parametrize("flips", [(0, 0), (3, 0), (0, 5), (2, 7), (6, 6), (40, 20)])
def test_mcnemar_is_the_share_of_coin_rows_at_least_as_uneven(flips: tuple[int, int]) -> None:
    count = sum(flips)
    if count <= 12:
        rows = [sum(row) for row in itertools.product((0, 1), repeat=count)]
        uneven = abs(flips[0] - flips[1])
        expected = sum(abs(2 * heads - count) >= uneven for heads in rows) / len(rows)
    else:
        expected = 0.013490  # scipy.stats.binomtest(20, 60).pvalue
    assert mcnemar(*flips) == pytest.approx(expected, rel=1e-3)


def results(cells: Pairing) -> dict[str, dict[str, object]]:
    return {"gsm8k": cells.as_dict()}


@pytest.mark.parametrize(
    ("cells", "limit", "outcome"),
    [
        (Pairing(150, 40, 2, 8), 0.05, "fail"),  # 19 points lost
        (Pairing(600, 4, 6, 390), 0.05, "pass"),
        (Pairing(9, 1, 0, 10), 0.05, "undecided"),  # 5 points lost, of 20 questions
        (Pairing(3, 0, 0, 2), 0.02, "undecided"),  # no flip at all, of 5 questions
        (Pairing(3, 0, 0, 2), 1.0, "pass"),
    ],
)
def test_gate_on_lost_accuracy_takes_its_error_into_account(cells: Pairing, limit: float, outcome: str) -> None:
    (gate,) = task_gates(results(cells), Limits(max_task_drop=limit))
    assert gate.outcome == outcome
    assert gate.value == pytest.approx((cells.lost - cells.gained) / cells.n)
    assert gate.lower <= gate.value <= gate.upper
    assert (gate_error([gate]) is None) == (outcome == "pass")
    if outcome == "undecided":
        assert task_gates(results(cells), Limits(max_task_drop=limit, undecided="pass"))[0].passed


def test_gate_is_refused_where_it_is_no_share_and_absent_where_none_is_asked() -> None:
    assert task_gates(results(Pairing(1, 0, 0, 1)), Limits()) == []
    with pytest.raises(UsageError, match=r"2\.0 is no share"):
        Limits(max_task_drop=2.0)
