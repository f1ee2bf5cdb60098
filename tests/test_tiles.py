"""Tiles of bfloat16 units: the products they should be, in every shape, and where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phi4edge.core.errors import MissingToolError
from phi4edge.model import tiles as module
from phi4edge.model.compute import has_bfloat16_units
from phi4edge.model.tiles import Tiles, in_pairs, needed_tiles, tiles
from phi4edge.quant.scheme import parse_scheme
from phi4edge.solvers import _refine, gptq
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.solvers._finished import put_transpose, transpose_of
from phi4edge.solvers._loss import layer_loss
from phi4edge.solvers._targets import shifted_target

needs_tiles = pytest.mark.skipif(tiles() is None, reason="no bfloat16 units here, or no tiles on them")
ON_UNITS = SolverOptions(on_units=True)


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@needs_tiles
@pytest.mark.parametrize("depth", [2, 64, 512, 1024, 2050])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (48, 300), (256, 512), (530, 17)])
def test_parts_of_arrays_are_multiplied(rows: int, columns: int, depth: int) -> None:
    left, right = drawn(rows, depth + 6).bfloat16()[:, 4 : depth + 4], drawn(depth, columns + 5, 1)
    sums = torch.ones(rows, columns + 3)
    needed_tiles().add(sums[:, 1 : columns + 1], left, in_pairs(right)[:, 2 : columns + 2])
    exact = left.double() @ right[:, 2 : columns + 2].bfloat16().double() + 1
    assert (sums[:, 1 : columns + 1].double() - exact).norm() < 1e-5 * exact.norm()
    assert bool((sums[:, 0] == 1).all())
    assert bool((sums[:, columns + 1 :] == 1).all())


@needs_tiles
def test_what_would_go_beyond_an_arrays_end_is_not_called() -> None:
    left, right, sums = drawn(20, 40).bfloat16(), in_pairs(drawn(40, 50)), torch.zeros(20, 50)
    units = needed_tiles()
    units.add(sums, left, right)
    for wrong in (
        (sums[:19], left, right),
        (sums[:, :49], left, right),
        (sums, left[:, :38], right),
        (sums, left, right[1:]),
        (sums.double(), left, right),
        (sums, left.float(), right),
        (torch.zeros(50, 20).T, left, right),
        (sums, drawn(40, 20).bfloat16().T, right),
        (sums, left, drawn(20, 100).bfloat16().view(20, 2, 50).transpose(1, 2)),
    ):
        with pytest.raises(AssertionError):
            units.add(*wrong)


def test_a_tile_that_is_no_product_is_not_used() -> None:
    def wrong(*_: object) -> None:
        """Leaves the sum as it was."""

    assert not module._adds_products(Tiles(wrong, lambda _: None))


@needs_tiles
def test_amx_is_left_to_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiles.__wrapped__() is not None
    monkeypatch.setattr(module, "has_amx", lambda: True)
    assert tiles.__wrapped__() is None


@pytest.mark.skipif(not has_bfloat16_units(), reason="no bfloat16 units")
def test_where_onednn_is_told_to_use_less_there_are_no_tiles() -> None:
    """They would end the process, as an error cannot pass through a call by symbol."""
    code = "from phi4edge.model.tiles import tiles; print(tiles() is not None)"
    for limit, expected in (("AVX2", "False"), ("", str(tiles() is not None))):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "ONEDNN_MAX_CPU_ISA": limit},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == expected


def problem(scheme: str, rows: int = 96, columns: int = 1536) -> Problem:
    x = drawn(2048, columns, 2) * torch.exp(0.5 * drawn(1, columns, 3)) + drawn(2048, 24, 4) @ drawn(24, columns, 5)
    H = (x.T @ x) / len(x)
    H.diagonal().mul_(1.25)
    return Problem("linear", 0.02 * drawn(rows, columns, 6), H, parse_scheme(scheme))


@needs_tiles
@pytest.mark.parametrize("far", [256, 384, 1536, 2048])
def test_a_factor_keeps_its_transpose_below_its_diagonal(far: int) -> None:
    M = drawn(1536, 1536)
    upper = M.triu()
    put_transpose(M, far)
    assert torch.equal(M.triu(), upper)
    for start in range(far, 1536, far):
        there = transpose_of(M)[start : start + far, :start]
        assert torch.equal(there, upper[:start, start : start + far].T.bfloat16())


@needs_tiles
@pytest.mark.parametrize("scheme", ["w4g64", "w4g32-asym", "w4row", "q4_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("order", ["", "act_order", "group_aware"])
def test_gptq_loses_no_more_on_tiles(scheme: str, order: str) -> None:
    """One weight in some dozens comes out otherwise; what that does to the loss is chance, and little."""
    whole = problem(scheme)
    options = replace(ON_UNITS, **({order: True} if order else {}))
    exact, ours = gptq.solve(whole, replace(options, on_units=False)), gptq.solve(whole, options)
    assert 0.9 < float((exact.linear.codes == ours.linear.codes).float().mean()) < 1
    assert layer_loss(whole, ours.linear) < 1.01 * layer_loss(whole, exact.linear)
    assert ours.loss == pytest.approx(layer_loss(whole, ours.linear), rel=1e-3)


@needs_tiles
@pytest.mark.parametrize("scheme", ["w4g64", "w4g32-asym", "q4_k"])
def test_refinement_gains_as_much_on_tiles(scheme: str) -> None:
    whole = problem(scheme)
    start = gptq.solve(whole, SolverOptions())
    options = replace(ON_UNITS, refit=True, sweeps=3)
    exact, ours = _refine.refine(whole, start, replace(options, on_units=False)), _refine.refine(whole, start, options)
    assert not torch.equal(exact.linear.codes, ours.linear.codes)
    assert exact.loss < 0.98 * start.loss
    assert ours.loss == pytest.approx(exact.loss, rel=0.01)


@needs_tiles
@pytest.mark.parametrize("rows", [7, 300])
def test_a_target_is_shifted_on_tiles(rows: int) -> None:
    whole = problem("w4g64", rows=rows, columns=512)
    factor, D = gptq.factor(whole, SolverOptions()), 0.1 * drawn(512, 512, 7)
    exact = whole.weight + 0.5 * factor.divide(whole.weight @ D)
    ours = shifted_target(whole.weight, factor, D.clone(), 0.5, multiplied=False, on_units=True)
    plain = shifted_target(whole.weight, factor, D.clone(), 0.5, multiplied=False)
    given = shifted_target(whole.weight, factor, whole.weight @ D, 0.5, multiplied=True, on_units=True)
    moved = (exact - whole.weight).norm()
    assert (plain - exact).norm() < 1e-4 * moved
    assert (given - exact).norm() < 1e-4 * moved
    assert 1e-4 * moved < (ours - exact).norm() < 5e-3 * moved


@needs_tiles
def test_bytes_on_tiles_do_not_depend_on_the_number_of_threads() -> None:
    whole, threads, found = problem("w4g64", rows=1100), torch.get_num_threads(), []
    made = gptq.factor(whole, ON_UNITS)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gptq.solve(replace(whole, factor=made), ON_UNITS))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0].linear.codes, other.linear.codes) for other in found[1:])


@needs_tiles
def test_rows_of_a_factor_on_tiles_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = problem("w4g64", rows=8)
    made = replace(whole, factor=gptq.factor(whole, ON_UNITS))
    assert made.factor is not None
    assert made.factor.on_tiles
    monkeypatch.setattr(module, "tiles", lambda: None)
    with pytest.raises(MissingToolError, match="tiles"):
        gptq.solve(made, ON_UNITS)


def test_without_tiles_solvers_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = problem("w4g64", rows=8)
    for user in (gptq, _refine):
        monkeypatch.setattr(user, "tiles", lambda: None)
    options = replace(ON_UNITS, refit=True, sweeps=1)
    plain = replace(options, on_units=False)
    exact, ours = (_refine.refine(whole, gptq.solve(whole, o), o) for o in (plain, options))
    assert torch.equal(exact.linear.codes, ours.linear.codes)
