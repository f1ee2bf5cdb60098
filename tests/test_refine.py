"""Refinement: codes moved and steps refitted lower each row's own objective, and nothing else happens."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import IN_FLOAT32
from test_quantize import CORPUS, TEXT, digests
from test_solvers import SCHEMES, problem
from torch import Tensor

from phi4edge.core.errors import UsageError
from phi4edge.core.recipe import Recipe
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.solvers import gptq, rtn
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._refine import refine
from phi4edge.stages.quantize import quantize

DAMP = 0.01
NESTED = ["q4_k", "q5_k", "q6_k"]  # groups share stored parameters


def damped(p: Problem) -> Tensor:
    assert p.hessian is not None
    H = p.hessian.double()
    return H + DAMP * H.diagonal().mean() * torch.eye(H.shape[0], dtype=torch.float64)


def objective(p: Problem, values: Tensor) -> Tensor:
    """e H eᵀ of every row, float64, with the damped H."""
    E = p.weight.double() - values.double()
    return ((E @ damped(p)) * E).sum(1)


def refined(p: Problem, solution: Solution, *, refit: bool = False, sweeps: int = 0, rows: int = 1536) -> Solution:
    return refine(p, solution, SolverOptions(damp_percent=DAMP, rows=rows, refit=refit, sweeps=sweeps))


def solved(p: Problem, solver: object = gptq) -> Solution:
    return solver.solve(p, SolverOptions(damp_percent=DAMP))  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("solver", [gptq, rtn], ids=["gptq", "rtn"])
@pytest.mark.parametrize("name", [*SCHEMES, *NESTED])
def test_no_row_gets_worse_and_all_together_get_better(name: str, solver: object) -> None:
    p = problem(name, columns=512 if name in NESTED else 128)
    plain = solved(p, solver)
    before = objective(p, plain.linear.dequantize())
    for switches in ({"refit": True}, {"sweeps": 1}, {"refit": True, "sweeps": 3}):
        after = objective(p, refined(p, plain, **switches).linear.dequantize())  # type: ignore[arg-type]
        assert bool((after <= before * (1 + 1e-6)).all()), switches
        assert float(after.sum()) < 0.99 * float(before.sum()), switches


@pytest.mark.parametrize("name", SCHEMES)
def test_every_further_sweep_lowers_the_objective_or_leaves_it(name: str) -> None:
    p = problem(name)
    plain = solved(p, rtn)
    for refit in (False, True):
        found = [plain] + [refined(p, plain, refit=refit, sweeps=k) for k in range(1, 7)]
        values = [objective(p, x.linear.dequantize()) for x in found]
        for earlier, later in pairwise(values):
            assert bool((later <= earlier * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", SCHEMES)
def test_refit_keeps_the_codes_and_sweeps_keep_the_steps(name: str) -> None:
    p = problem(name)
    plain = solved(p)
    refit, swept = refined(p, plain, refit=True).linear, refined(p, plain, sweeps=2).linear
    assert torch.equal(refit.codes, plain.linear.codes)
    assert not torch.equal(swept.codes, plain.linear.codes)
    assert all(torch.equal(swept.params[f], plain.linear.params[f]) for f in swept.params)
    assert int(swept.codes.min()) >= grid_for(swept.scheme).low
    assert int(swept.codes.max()) <= grid_for(swept.scheme).high


def least_squares(p: Problem, linear: QuantizedLinear) -> Tensor:
    """The objective of every row at the best real steps of all groups together, by dense least squares in float64."""
    grid = grid_for(p.scheme)
    groups, n = p.scheme.groups(linear.in_features), linear.in_features
    R = torch.linalg.cholesky(damped(p))  # e H eᵀ = ‖e R‖²
    place = torch.arange(n) // (n // groups)
    found = []
    for row in range(linear.out_features):
        q = linear.codes[row].double()
        zeros = linear.params["zeros"][row].double()[place] if "zeros" in linear.params else grid.middle
        columns = [q, torch.ones(n, dtype=torch.float64)] if "mins" in grid.fields else [q - zeros]
        B = torch.zeros(n, groups * len(columns), dtype=torch.float64)
        for k, column in enumerate(columns):
            B[torch.arange(n), place + k * groups] = column
        target = (R.T @ p.weight[row].double())[:, None]
        steps = torch.linalg.lstsq(R.T @ B, target, driver="gelsd").solution
        found.append(((target - R.T @ B @ steps) ** 2).sum())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["w4row", "w4row-asym"])
def test_refit_of_one_group_is_the_least_squares_solution(name: str) -> None:
    """Where a row is one group nothing is iterated: what is left is the rounding of the scale to float16."""
    p = problem(name, rows=8)
    plain = solved(p)
    values = refined(p, plain, refit=True).linear.dequantize().double()
    rounding = 2.0**-22 * ((values @ damped(p)) * values).sum(1)  # float16 is off by at most one part in 2,048
    after, best = objective(p, values), least_squares(p, plain.linear)
    assert bool((after >= best * (1 - 1e-6)).all())
    assert bool((after <= best + 1.01 * rounding).all())
    assert float(rounding.sum()) < 0.1 * float((objective(p, plain.linear.dequantize()) - best).sum())


@pytest.mark.parametrize("name", ["w4g32", "q4_0", "q4_1", "w4g32-asym"])
def test_refit_comes_near_the_joint_least_squares_of_all_groups(name: str) -> None:
    p = problem(name, rows=8, rank=64)
    plain = solved(p)
    before, best = objective(p, plain.linear.dequantize()).sum(), least_squares(p, plain.linear).sum()
    fit = plain
    for _ in range(10):
        fit = refined(p, fit, refit=True)
    after = objective(p, fit.linear.dequantize()).sum()
    assert float(best) < float(after) < float(best + 0.05 * (before - best))
    once = objective(p, refined(p, plain, refit=True).linear.dequantize()).sum()
    assert float(once) < float(best + 0.25 * (before - best))


@pytest.mark.parametrize("name", ["w4g16", "w4g32-asym", "q4_1", "w4row"])
def test_sweeps_end_where_no_single_code_can_be_bettered(name: str) -> None:
    """Brute force: one step up or down of any code of a settled solution gains nothing."""
    p = problem(name, rows=6, columns=64)
    linear = refined(p, solved(p, rtn), sweeps=200).linear
    grid, base = grid_for(p.scheme), objective(p, linear.dequantize())
    for i in range(64):
        for step in (-1, 1):
            codes = linear.codes.int()
            codes[:, i] = (codes[:, i] + step).clamp(grid.low, grid.high)
            moved = replace(linear, codes=codes.to(torch.uint8))
            assert bool((objective(p, moved.dequantize()) >= base * (1 - 1e-4)).all()), (i, step)


@pytest.mark.parametrize("name", ["w4g32", "q4_1"])
def test_alternation_beats_each_alone(name: str) -> None:
    p = problem(name, rows=200)
    plain = solved(p)
    alone = [refined(p, plain, refit=True).loss, refined(p, plain, sweeps=8).loss]
    both = refined(p, plain, refit=True, sweeps=8)
    assert both.loss < min(alone) < plain.loss
    assert both.loss_unrefined == plain.loss


def test_rows_do_not_depend_on_those_they_are_refined_with() -> None:
    p = problem("w4g32", rows=50)
    plain = solved(p)
    whole, parts = refined(p, plain, refit=True, sweeps=2), refined(p, plain, refit=True, sweeps=2, rows=7)
    assert int((whole.linear.codes != parts.linear.codes).any(dim=1).sum()) <= 1


def test_nothing_happens_without_a_hessian_or_a_switch() -> None:
    p = problem("w4g32")
    plain = solved(p)
    assert refined(p, plain) is plain
    assert refined(replace(p, hessian=None), plain, refit=True, sweeps=2) is plain


def test_dead_columns_and_zero_rows_stay_sound_even_undamped() -> None:
    p = problem("q4_1")
    assert p.hessian is not None
    H, W = p.hessian.clone(), p.weight.clone()
    H[5], H[:, 5] = 0, 0
    H[32:64], H[:, 32:64] = 0, 0  # a whole group
    W[3] = 0
    p = replace(p, hessian=H, weight=W)
    plain = rtn.solve(p, SolverOptions())
    after = refine(p, plain, SolverOptions(damp_percent=0.0, refit=True, sweeps=4)).linear
    assert bool(torch.isfinite(after.dequantize()).all())
    assert torch.equal(after.codes[:, 32:64], plain.linear.codes[:, 32:64])
    assert not after.dequantize()[3].any()


KILLER = """
import os, signal, sys
from pathlib import Path
import phi4edge.core.atomic, phi4edge.core.workdir
from phi4edge.core.recipe import CorpusRecipe, Recipe
from phi4edge.stages.quantize import quantize
sync, count = os.fsync, 0
def dying(descriptor):
    global count
    count += 1
    if (Path(sys.argv[2]) / "journal.jsonl").exists() and count > int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = dying
quantize(sys.argv[1], Recipe(**eval(sys.argv[5]), corpus=CorpusRecipe(sys.argv[3], 8, 48)), Path(sys.argv[2]))
"""
SWITCHES: list[dict[str, Any]] = [
    {"refit": True, "sweeps": 2},
    {"group_aware": True},
    {"full_precision_targets": 0.5},
    {"method": "rtn", "sweeps": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s))
def test_with_every_switch_a_killed_run_resumes_to_the_same_bytes(
    switches: dict[str, Any], phi4_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Recipe(**switches, corpus=CORPUS)
    quantize(phi4_checkpoint, recipe, tmp_path / "whole")
    run, journal = tmp_path / "run", tmp_path / "run" / "journal.jsonl"
    arguments = [str(phi4_checkpoint), str(run), TEXT, "5", repr(switches)]
    killed = subprocess.run(
        [sys.executable, "-c", IN_FLOAT32 + KILLER, *arguments], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert journal.read_bytes().count(b"\n") == 1
    quantize(phi4_checkpoint, recipe, run)
    assert digests(run) == digests(tmp_path / "whole")
    # And again as if killed after block 0, its residual streams lost.
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b"\n")
    (run / "manifest.json").unlink()
    quantize(phi4_checkpoint, recipe, run)
    assert digests(run) == digests(tmp_path / "whole")


def test_a_refined_run_records_what_refining_gained(phi4_checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", refit=True, sweeps=2, corpus=CORPUS)
    data = quantize(phi4_checkpoint, recipe, tmp_path / "run").manifest["data"]
    for linear in data["linears"]:
        assert linear["loss"] < linear["loss_unrefined"]
        assert linear["damp_percent"] == recipe.damp_percent
        assert linear["heldout_error"]["rest"] != linear["heldout_error_rtn"]["rest"]


def test_impossible_switches_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="two orders of the same columns"):
        Recipe(act_order=True, group_aware=True)
    with pytest.raises(UsageError, match="sweeps -1 is negative"):
        Recipe(sweeps=-1)
    with pytest.raises(UsageError, match="need calibration text"):
        Recipe(method="rtn", corpus=None, refit=True)
