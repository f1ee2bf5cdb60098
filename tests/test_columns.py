"""Walks over columns: what is compiled for the CPU does what tensors do elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4edge.quant.grid import grid_for
from phi4edge.quant.scheme import parse_scheme
from phi4edge.quant.search import search
from phi4edge.solvers._columns import Panel, Steps, _move_columns, _round_columns, move_columns, round_columns

ROWS, COLUMNS = 700, 32  # rows: no whole number of lanes


@pytest.fixture(params=["w4g32", "w4g32-asym", "q4_1", "q8_0"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps_of(name: str, W: Tensor) -> Steps:
    """Steps of two groups of 32 of ``W`` [rows, 64]; the second group of the third row has none."""
    grid = grid_for(parse_scheme(name))
    steps = Steps(grid, 2, len(W), W.device)
    W[2, 32:] = 0
    steps.put(0, search(grid, W.reshape(len(W), 2, 32), torch.ones(2, 32)))
    return steps


def test_columns_are_rounded_as_with_tensors(name: str) -> None:
    grid, W = grid_for(parse_scheme(name)), draw(ROWS, 2 * COLUMNS)
    steps = steps_of(name, W)
    original = W[:, COLUMNS:].T.contiguous()
    work = original + 0.1 * draw(COLUMNS, ROWS, seed=1)
    triangle, d = draw(COLUMNS, COLUMNS, seed=2) * 0.1, draw(COLUMNS, seed=3).square()
    groups, places = torch.ones(COLUMNS, dtype=torch.int64), COLUMNS + torch.arange(COLUMNS).flip(0)
    found = []
    for walk in (round_columns, _round_columns):
        codes, errors = torch.zeros(2 * COLUMNS, ROWS, dtype=torch.uint8), torch.empty(COLUMNS, ROWS)
        panel = Panel(work.clone(), original, triangle, d, groups, places)
        lost = walk(grid, panel, steps, 0.01, errors, codes)
        found.append((codes, errors, lost))
    (codes, errors, lost), (expected_codes, expected_errors, expected_lost) = found
    # A value half way between two codes may fall to the other one where a product was fused with its sum.
    alike = (codes == expected_codes).all(0)
    assert float(alike.double().mean()) > 0.99
    assert not codes[:COLUMNS].any(), "codes go to their places alone"
    assert codes[COLUMNS:].any()
    assert torch.allclose(errors[:, alike], expected_errors[:, alike], atol=1e-5)
    assert lost == pytest.approx(expected_lost, rel=1e-3)
    value = steps.a[1] * codes[COLUMNS:].flip(0).float() + steps.b[1]
    assert torch.allclose(errors, original - value, atol=1e-5), "an error is w less what its code stands for"


def test_codes_move_as_with_tensors(name: str) -> None:
    grid, W = grid_for(parse_scheme(name)), draw(ROWS, 2 * COLUMNS)
    step = steps_of(name, W).a[1]
    pull = draw(COLUMNS, ROWS, seed=4) * 0.3
    H = draw(COLUMNS, 200, seed=5)
    hessian = H @ H.T / 200 + 0.3
    inverse = 1 / hessian.diagonal()
    inverse[7] = 0  # a column that has no say
    before = torch.randint(grid.low, grid.high + 1, (COLUMNS, ROWS), generator=torch.Generator().manual_seed(6))
    found = []
    for walk in (move_columns, _move_columns):
        codes = before.to(torch.uint8)
        change, moved = walk(grid, pull, step, hessian, inverse, codes)
        assert torch.allclose(change, (before - codes.float()) * step, atol=1e-6)
        assert moved == int((codes != before).sum())
        assert torch.equal(codes[7], before[7].to(torch.uint8))
        assert int(codes.min()) >= grid.low
        found.append((codes, moved))
    (codes, moved), (expected, expected_moved) = found
    assert moved > 1000
    assert abs(moved - expected_moved) < 0.01 * moved
    assert float((codes != expected).any(0).double().mean()) < 0.01
