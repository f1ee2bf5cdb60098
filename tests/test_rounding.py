"""Rounding to given steps in one pass, and of weights that are read a few rows at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_checkpoint
from torch import Tensor

from phi4edge.calibration.budget import plan_memory
from phi4edge.checkpoint import rows_ahead
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.checkpoint.rows_ahead import SomeRows
from phi4edge.core.memory import peak_rss_bytes, reset_peak_rss
from phi4edge.core.recipe import Recipe
from phi4edge.quant import rounding
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.rounding import round_to
from phi4edge.quant.scheme import parse_scheme
from phi4edge.quant.search import search
from phi4edge.solvers import rtn
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.solvers._loss import layer_loss
from phi4edge.stages.job import prepare
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run

SCHEMES = ["w4g32", "w4g64-asym", "w8row", "q4_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    values = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3
    values[0] = 0  # steps of zero
    values[1] = (values[1] * 100).round() / 64  # ties
    return values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_pass_finds_the_codes_and_the_loss_that_tensors_do(scheme: str, weighted: bool) -> None:
    grid, columns = grid_for(parse_scheme(scheme)), 512
    W = weights(40, columns)
    groups = grid.scheme.groups(columns)
    importance = torch.rand(groups, columns // groups) if weighted else None
    grouped = W.reshape(40, groups, -1)
    params = search(grid, grouped, importance)
    codes, lost = round_to(grid, grouped, params, importance)
    a, b = (each[:, :, None] for each in grid.steps(params))
    q = grid.encode(grouped, a, b)
    linear = QuantizedLinear("layer", grid.scheme, q.to(torch.uint8).reshape(40, columns), params)
    assert torch.equal(codes, linear.to_tensors()["layer.codes"])
    E = W - linear.dequantize()
    h = torch.ones(columns) if importance is None else importance.reshape(-1)
    assert lost == pytest.approx(float((E.double().square() * h).sum()), rel=1e-5)


def test_a_group_may_have_an_odd_number_of_values() -> None:
    grid = grid_for(parse_scheme("w8row"))
    grouped = weights(40, 51).reshape(40, 1, 51)
    params = search(grid, grouped)
    a, b = (each[:, :, None] for each in grid.steps(params))
    assert torch.equal(round_to(grid, grouped, params)[0], grid.encode(grouped, a, b).to(torch.uint8).reshape(40, 51))


def test_codes_are_the_same_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        """A tensor that says it is on another device."""

        type = "meta"

    grid = grid_for(parse_scheme("q4_0"))
    grouped = weights(40, 512).reshape(40, 16, 32)
    params = search(grid, grouped)
    here = round_to(grid, grouped, params)
    monkeypatch.setattr(rounding, "round_groups", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "device", property(lambda _: Elsewhere), raising=False)
        there = round_to(grid, grouped, params)
    assert torch.equal(here[0], there[0])
    assert here[1] == pytest.approx(there[1], rel=1e-9)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_at_a_time_give_what_the_whole_gives(
    scheme: str, weighted: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, found = weights(300, 512), parse_scheme(scheme)
    h = torch.rand(512) if weighted else None
    with monkeypatch.context() as patch:
        patch.setattr(rtn, "nearest", lambda *_: None)
        whole = rtn.solve(Problem("layer", W, None, found, h), SolverOptions())
    asked: list[int] = []

    def some(rows: slice) -> Tensor:
        asked.append(rows.stop - rows.start)
        return W[rows]

    monkeypatch.setattr(rtn, "_TOGETHER", 7 * 512)
    opened: list[slice] = []

    def opening(piece: slice) -> AbstractContextManager[SomeRows]:
        opened.append(piece)
        return nullcontext(SomeRows(some, W[piece]))

    if not at_once:
        monkeypatch.setattr(rtn, "nearest", lambda *_: None)
    room = rtn.Room()
    for place in (None, room, room):
        parts = rtn.solve_rows("layer", (300, 512), opening, found, h, SolverOptions(rows=100), place)
        assert sorted(piece.start for piece in opened) == [0, 100, 200]
        if not at_once or weighted or not found.symmetric or found.nested:
            assert max(asked) == 7
            assert sum(asked) == 300
        for one, other in zip(whole.linear.to_tensors().values(), parts.linear.to_tensors().values(), strict=True):
            assert torch.equal(one, other)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-9)
        asked.clear()
        opened.clear()
    memory = [values.data_ptr() for values in parts.linear.to_tensors().values()]
    again = rtn.solve_rows("other", (300, 512), opening, found, h, SolverOptions(rows=100), room)
    assert [values.data_ptr() for values in again.linear.to_tensors().values()] == memory
    assert whole.loss == pytest.approx(layer_loss(Problem("layer", W, None, found, h), whole.linear), rel=1e-9)


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1"])
def test_a_data_free_run_holds_no_weight_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    model = write_checkpoint(tmp_path / "model", "phi4", hidden_size=1024, intermediate_size=8192)
    recipe = Recipe(method="rtn", corpus=None, scheme=scheme)
    asked: list[int] = []
    pieces: list[int] = []
    read, widened = rows_ahead.read_tensor, rows_ahead.finite_values

    def read_tensor(*arguments: Any, **named: Any) -> Tensor:
        found = read(*arguments, **named)
        pieces.append(found.numel())
        return found

    def finite_values(*arguments: Any) -> Tensor:
        found = widened(*arguments)
        asked.append(found.numel())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(rows_ahead, "read_tensor", read_tensor)
        patch.setattr(rows_ahead, "finite_values", finite_values)
        reset = reset_peak_rss()
        before = peak_rss_bytes()
        quantize(model, recipe, tmp_path / "run")
    config = open_checkpoint(model).config
    largest = max(out * columns for out, columns in config.linear_shapes.values())
    assert sum(pieces) == config.linear_parameters
    assert max(pieces) <= 1 << 21 < largest // 4
    if scheme == "q4_1":  # of which some rows at a time are rounded
        assert max(asked) <= 1 << 18
        assert sum(asked) == config.linear_parameters
    if reset:
        assert peak_rss_bytes() - before < plan_memory(config, recipe, None).least - before
    run, checkpoint = open_run(tmp_path / "run"), open_checkpoint(model)
    for name in run.linears:
        problem = Problem(name, checkpoint.tensor(f"{name}.weight"), None, parse_scheme(scheme))
        expected = rtn.solve(problem, SolverOptions()).linear
        assert torch.equal(run.load(name).codes, expected.codes)


def test_a_weight_that_must_be_whole_is_planned_for(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "phi4", hidden_size=1024, intermediate_size=8192)
    config, recipe = open_checkpoint(model).config, Recipe(method="rtn", corpus=None, scheme="q4_0")
    largest = max(out * columns for out, columns in config.linear_shapes.values())
    rows, whole = (plan_memory(config, recipe, None, by_rows=by_rows).least for by_rows in (True, False))
    assert whole - rows > 4 * largest
    assert plan_memory(config, recipe, None).least == pytest.approx(rows, abs=8 << 20)  # of this process's own RSS
    turned = replace(recipe, rotation="heads")
    assert plan_memory(config, turned, None).least >= whole - (8 << 20)
    assert prepare(open_checkpoint(model), recipe, None, "cpu").by_rows
    assert not prepare(open_checkpoint(model), recipe, None, "cpu", spread=True).by_rows
    assert not prepare(open_checkpoint(model), turned, None, "cpu").by_rows
