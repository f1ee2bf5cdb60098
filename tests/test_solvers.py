"""Solvers: GPTQ is the paper's algorithm, never worse than rounding to nearest where it can know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import NestedGrid, grid_for
from phi4edge.quant.parallel import row_pieces
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme, parse_scheme
from phi4edge.quant.search import search, search_again
from phi4edge.solvers import gptq, rtn
from phi4edge.solvers._api import Problem, SolverOptions
from phi4edge.solvers._loss import layer_loss

SCHEMES = ["w4g32", "w4g16", "w4g64", "w4row", "w4g32-asym", "w8g32", "w8g64-asym", *GGML_SCHEMES]
TINY_DAMP = SolverOptions(damp_percent=1e-6)


def problem(scheme: str | Scheme, rows: int = 24, columns: int | None = None, seed: int = 0, rank: int = 16) -> Problem:
    """Correlated inputs (low rank plus noise), as a trained model's are; four groups of 32, or two super-blocks."""
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    columns = columns or (512 if scheme.nested else 128)
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, columns, generator=generator)
    inputs = torch.randn(1024, rank, generator=generator) @ mixing + 0.3 * torch.randn(
        1024, columns, generator=generator
    )
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return Problem("layer", weight, inputs.T @ inputs / 1024, scheme)


def naive_obq(p: Problem, damp: float, order: list[int] | None = None) -> Tensor:
    """Optimal Brain Quantization, column by column in float64 with the explicit inverse (arXiv 2208.11580).

    Columns go as they stand or in ``order``, which keeps groups together; a group's scales are searched as it begins.
    """
    W, grid = p.weight.double().clone(), grid_for(p.scheme)
    rows, n = W.shape
    assert p.hessian is not None
    H = p.hessian.double()
    H = H + damp * H.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    size = n // p.scheme.groups(n)
    unit = p.scheme.unit
    codes = torch.empty(rows, n)
    inverse = torch.linalg.inv(H)
    for count, i in enumerate(order or range(n)):
        if count % unit == 0:
            columns = slice(i // unit * unit, i // unit * unit + unit)
            part = W[:, columns].float().reshape(rows, -1, size)
            params = search(grid, part, p.hessian.diagonal()[columns].reshape(-1, size))
        elif count % size == 0:
            assert isinstance(grid, NestedGrid)
            columns = slice(i // size * size, i // size * size + size)
            h = p.hessian.diagonal()[columns]
            params = search_again(grid, params, i % unit // size, W[:, columns].float(), h)
        steps = grid.steps(params)
        a, b = (s[:, i % unit // size] for s in steps)
        q = grid.encode(W[:, i].float(), a, b)
        codes[:, i] = q
        error = (W[:, i] - (a.double() * q.double() + b.double())) / inverse[i, i]
        W -= error[:, None] * inverse[i][None, :]
        # Take column i out of the problem: one step of Gaussian elimination on the inverse.
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[i, i] = 1.0
    return codes.to(torch.uint8)


@pytest.mark.parametrize("name", ["w4g32", "w4g32-asym", "q4_0", "q4_1", "w8g64", "q5_0", "q4_k", "q6_k"])
def test_gptq_codes_equal_naive_obq(name: str) -> None:
    p = problem(name)
    ours = gptq.solve(p, SolverOptions(damp_percent=0.01)).linear.codes
    theirs = naive_obq(p, 0.01)
    # Where two codes, or two steps, are equally good to the last float32 bit, a row may go either way.
    columns = p.scheme.unit if p.scheme.nested else p.weight.shape[1]
    assert int((ours != theirs)[:, :columns].any(dim=1).sum()) <= 1
    # Of a later super-block many steps come from least squares, which float16 rounds up or down: a sixth of the rows.
    assert int((ours != theirs).any(dim=1).sum()) <= (8 if p.scheme.nested else 1)


@pytest.mark.parametrize("name", ["w4g32", "w4g16", "w4g32-asym", "q4_1"])
def test_group_aware_order_is_obq_in_that_order(name: str) -> None:
    """Groups by their most excited column, columns by excitement inside them, every group whole."""
    p = problem(name)
    assert p.hessian is not None
    groups, h = p.scheme.groups(128), p.hessian.diagonal()
    size = 128 // groups
    ranked = sorted(range(groups), key=lambda g: -float(h[g * size : (g + 1) * size].max()))
    order = [i for g in ranked for i in sorted(range(g * size, (g + 1) * size), key=lambda i: -float(h[i]))]
    assert order != list(range(128))
    ours = gptq.solve(p, SolverOptions(damp_percent=0.01, group_aware=True)).linear.codes
    # Rows may go either way where two steps are equally good to the last float32 bit (two of q4_1's do).
    assert int((ours != naive_obq(p, 0.01, order)).any(dim=1).sum()) <= 2


@pytest.mark.parametrize("name", ["w4g32", "q4_1", "q4_k", "q6_k", "w4row"])
def test_group_aware_order_with_equal_columns_changes_nothing(name: str) -> None:
    """Where all columns are equally excited there is one order, whatever the grid keeps together."""
    p = problem(name, columns=512)
    assert p.hessian is not None
    scale = p.hessian.diagonal().rsqrt()
    H = p.hessian * scale[:, None] * scale[None, :]
    H.diagonal().fill_(1.0)
    level = Problem("layer", p.weight, H, p.scheme)
    a, b = (gptq.solve(level, SolverOptions(group_aware=aware)).linear for aware in (False, True))
    assert torch.equal(a.codes, b.codes)
    assert all(torch.equal(a.params[f], b.params[f]) for f in a.params)


@pytest.mark.parametrize("name", SCHEMES)
def test_group_aware_order_is_a_solution_like_any_other(name: str) -> None:
    p = problem(name)
    found = gptq.solve(p, SolverOptions(damp_percent=0.01, group_aware=True))
    assert found.loss < 0.7 * rtn.solve(p, SolverOptions()).loss
    columns = p.weight.shape[1]
    units = columns // p.scheme.unit if p.scheme.unit > 0 else 1
    assert found.linear.params["scales"].shape == (24, units)


@pytest.mark.parametrize("order", [{}, {"act_order": True}, {"group_aware": True}], ids=["", "act", "groups"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_loss_that_falls_off_in_the_loop_is_that_of_the_codes(name: str, order: dict[str, bool]) -> None:
    p = problem(name, rows=40)
    assert p.hessian is not None
    p.weight[3], p.weight[5, :64] = 0, 0  # groups without a step
    p.hessian[7], p.hessian[:, 7] = 0, 0  # an input without a say
    for options in (SolverOptions(**order), SolverOptions(damp_percent=0.3, rows=16, **order)):
        found = gptq.solve(p, options)
        assert found.loss == pytest.approx(layer_loss(p, found.linear), rel=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_gptq_with_identity_hessian_is_rtn(name: str) -> None:
    p = problem(name)
    eye = Problem(p.name, p.weight, torch.eye(p.weight.shape[1]), p.scheme)
    a, b = gptq.solve(eye, SolverOptions()).linear, rtn.solve(eye, SolverOptions()).linear
    assert torch.equal(a.codes, b.codes)
    assert all(torch.equal(a.params[f], b.params[f]) for f in a.params)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCHEMES)
def test_gptq_error_is_at_most_rtn_on_correlated_inputs(name: str, seed: int) -> None:
    p = problem(name, seed=seed)
    for options in (TINY_DAMP, SolverOptions(damp_percent=0.01, act_order=True)):
        assert gptq.solve(p, options).loss < 0.7 * rtn.solve(p, options).loss


@pytest.mark.parametrize("act_order", [False, True])
def test_rows_are_independent_of_how_they_are_chunked(act_order: bool) -> None:
    p = problem("w4g32", rows=50)
    whole = gptq.solve(p, SolverOptions(act_order=act_order)).linear
    parts = gptq.solve(p, SolverOptions(act_order=act_order, rows=7)).linear
    assert int((whole.codes != parts.codes).any(dim=1).sum()) <= 1


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_stay_on_the_grid_and_dequantize_to_their_steps(name: str) -> None:
    linear = gptq.solve(problem(name), SolverOptions()).linear
    grid = grid_for(linear.scheme)
    assert int(linear.codes.min()) >= grid.low
    assert int(linear.codes.max()) <= grid.high
    step, _ = grid.steps(linear.params)
    if linear.scheme.symmetric:
        scale = step.repeat_interleave(linear.in_features // step.shape[1], dim=1)
        assert torch.equal(linear.dequantize(), scale * (linear.codes.float() - grid.middle))


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_already_on_the_grid_are_kept(name: str) -> None:
    p = problem(name)
    on_grid = Problem(p.name, rtn.solve(p, SolverOptions()).linear.dequantize(), p.hessian, p.scheme)
    for solver in (rtn, gptq):
        kept = solver.solve(on_grid, SolverOptions()).linear.dequantize()
        # Codes shifted by one another minimum would do as well, but no multiple of dmin: not all are found again.
        most = 2e-2 if p.scheme.nested else 2e-3
        assert float((kept - on_grid.weight).norm() / on_grid.weight.norm()) < most


def test_scale_search_beats_absmax_in_the_weighted_error() -> None:
    p = problem("w4g32", rows=200)
    assert p.hessian is not None
    grid, h = grid_for(p.scheme), p.hessian.diagonal().reshape(4, 32)
    x = p.weight.reshape(200, 4, 32)
    searched, absmax = search(grid, x, h), {"scales": (x.abs().amax(-1) / 7).half()}

    def error(params: dict[str, Tensor]) -> float:
        a, b = (s[:, :, None] for s in grid.steps(params))
        return float((h * (x - (a * grid.encode(x, a, b) + b)) ** 2).sum())

    assert error(dict(searched)) < 0.75 * error(absmax)


@pytest.mark.parametrize("columns", [128, 1152])  # one block of the factorisation, and three
@pytest.mark.parametrize("raised", [False, True])
def test_a_factor_in_the_place_of_its_hessian_is_the_same_and_leaves_the_hessian_below_the_diagonal(
    columns: int, raised: bool
) -> None:
    p = problem("w4g32", columns=columns)
    assert p.hessian is not None
    if raised:  # so far from positive definite that the first tries fail, behind blocks that were made by then
        p.hessian[0, 1] = p.hessian[1, 0] = 1.005 * float(p.hessian[0, 0] * p.hessian[1, 1]) ** 0.5
    options, used_up = SolverOptions(damp_percent=1e-6), p.hessian.clone()
    apart = gptq.factor(p, options)
    within = gptq.factor(replace(p, hessian=used_up), options, in_place=True)
    assert within.M.data_ptr() == used_up.data_ptr()
    assert bool(within.events) == raised
    assert torch.equal(within.M.triu(), apart.M.triu())
    assert torch.equal(within.d, apart.d)
    assert torch.equal(within.diagonal, p.hessian.diagonal())
    assert torch.equal(used_up.tril(-1), p.hessian.tril(-1))
    R = within.M.triu().double() * within.d.double().sqrt()
    damped = p.hessian.double() + within.damp * torch.eye(columns, dtype=torch.float64)
    assert torch.allclose(R @ R.T, damped, atol=1e-4)
    alone = gptq.solve(replace(p, hessian=None, factor=within), options)
    whole = gptq.solve(p, options)
    assert torch.equal(alone.linear.codes, whole.linear.codes)
    assert alone.loss == whole.loss


def test_a_singular_hessian_is_damped_until_it_factors_and_the_event_says_so() -> None:
    p = problem("w4g32")
    ones = torch.ones(128, 128)
    solution = gptq.solve(Problem("layer", p.weight, ones, p.scheme), SolverOptions(damp_percent=0.0))
    assert [e.kind for e in solution.events] == ["damping_raised"]
    assert solution.damp_percent > 0
    assert torch.isfinite(solution.linear.dequantize()).all()


def test_dead_columns_are_reported_and_harmless() -> None:
    p = problem("w4g32")
    assert p.hessian is not None
    H = p.hessian.clone()
    H[5], H[:, 5] = 0, 0
    solution = gptq.solve(Problem("layer", p.weight, H, p.scheme), SolverOptions())
    assert [e.kind for e in solution.events] == ["dead_columns"]
    # The dead column is rounded with its group, not zeroed: other data may excite it.
    assert float((solution.linear.dequantize() - p.weight)[:, 5].abs().max()) < float(p.weight.abs().max())


def test_a_zero_weight_matrix_stays_zero() -> None:
    for name in SCHEMES:
        p = problem(name)
        zero = Problem("layer", torch.zeros_like(p.weight), p.hessian, p.scheme)
        for solver in (rtn, gptq):
            assert not solver.solve(zero, SolverOptions()).linear.dequantize().any()


def test_a_group_size_that_does_not_divide_is_refused_with_valid_ones() -> None:
    p = problem("w4g32", columns=48)
    for solver in (rtn, gptq):
        with pytest.raises(InputError, match="in_features 48 is not divisible by group_size 32") as caught:
            solver.solve(p, SolverOptions())
        assert "8, 12, 16, 24, 48" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 32), (960, 576), (1025, 576), (5120, 3072), (16384, 3072), (5120, 17920)]
)
def test_pieces_of_rows_depend_on_the_shape_alone_cover_it_once_and_are_even(rows: int, columns: int) -> None:
    pieces = row_pieces(rows, columns)
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(rows))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert len(pieces) == 1 if rows <= 1024 else len(pieces) % 2 == 0
    assert max(sizes) <= 4096
    assert max(sizes) * columns <= 2**25
    assert max(sizes) - min(sizes) < len(pieces)
