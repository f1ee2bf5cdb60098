"""The searches: compiled and with tensors they give the same bits, which are those that a plain loop finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phi4edge.core.errors import InputError
from phi4edge.quant import search as module
from phi4edge.quant.grid import NestedGrid, grid_for, half
from phi4edge.quant.rounding import round_to
from phi4edge.quant.scheme import parse_scheme
from phi4edge.quant.search import _ratios, _sum, nearest, search

SCHEMES = [
    "q4_0",
    "w4g64",
    "w4g128",
    "q5_0",
    "q8_0",
    "w4g32-asym",
    "w8g32-asym",
    "q4_1",
    "q5_1",
    "q4_k",
    "q5_k",
    "q6_k",
]


def by_quads(values: Tensor) -> Tensor:
    """Sums of [n, size] over the rows: four after four, in pairs."""
    total = torch.zeros(values.shape[0])
    for i in range(0, values.shape[1], 4):
        a, b, c, d = values[:, i : i + 4].T
        total = total + ((a + b) + (c + d))
    return total[:, None]


def plain(scheme_name: str, x: Tensor, h: Tensor) -> Tensor:
    """Scales of groups ``x`` [n, size], one candidate after the other."""
    grid = grid_for(parse_scheme(scheme_name))
    low, high = float(grid.low - grid.middle), float(grid.high - grid.middle)
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    inverse = 1 / torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    best, scale = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)

    def ratio(above: Tensor, below: Tensor) -> Tensor:
        return torch.where(below > 0, above / below.clamp_min(1e-38), torch.zeros_like(above))

    def consider(inverse: Tensor) -> None:
        nonlocal best, scale
        q = torch.round(x * inverse).clamp(low, high)
        along, square = by_quads(h * x * q), by_quads(h * q * q)
        score = ratio(along * along, square)
        scale = torch.where(score > best, ratio(along, square), scale)
        best = torch.maximum(score, best)

    for step in _ratios(grid.scheme, x.shape[1], alike=bool((h == 1).all())):
        consider(low * step * inverse)
        if low != -high:
            consider(high * step * inverse)
    for _ in range(2):
        consider(ratio(torch.ones_like(scale), scale.abs()) * scale.sign())
    return half(scale)


def groups(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Groups [count, size], of every kind that may need care."""
    values = torch.randn(count, size, generator=generator) ** 3
    values[0] = 0  # no scale
    values[1, 1:] = 0  # one weight alone
    values[2] = values[2].round()  # ties
    values[3, 1] = -values[3, 0]
    values[4] = values[4].bfloat16().float() * 1e-6  # float16 can hardly say it
    values[5], values[6] = values[5].abs(), -values[6].abs()
    values[7] = 1.5  # no span
    values[8] *= 1e30
    return values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", ["q4_0", "w4g64", "w4g128", "q5_0", "q8_0"])
def test_a_symmetric_search_finds_what_a_loop_finds(scheme: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    size = parse_scheme(scheme).group_size
    values = groups(size, 350, generator).reshape(70, 5, size)
    values[1, 3] /= 1e30  # else beyond float16
    importance = torch.rand(5, size, generator=generator) ** 4 + 1e-3 if weighted else None
    h = torch.ones(5, size) if importance is None else importance
    found = search(grid_for(parse_scheme(scheme)), values, importance)["scales"]
    expected = plain(scheme, values.reshape(-1, size), h.expand_as(values).reshape(-1, size))
    assert torch.equal(found.view(torch.int16), expected.reshape(70, 5).view(torch.int16))


@pytest.mark.parametrize("counts", [None, 1, 5, 350])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [None, 50])
def test_compiled_and_with_tensors_a_search_gives_the_same_bits(
    scheme: str, counts: int | None, size: int | None
) -> None:
    grid = grid_for(parse_scheme(scheme))
    generator = torch.Generator().manual_seed(2)
    size = size or grid.scheme.group_size
    x = groups(size, 350, generator)
    h = None if counts is None else torch.rand(counts, size, generator=generator) ** 4 + 1e-3
    compiled, with_tensors = (both(grid, place, x, h) for place in (True, False))
    assert torch.equal(compiled.view(torch.int32), with_tensors.view(torch.int32))


def both(grid: NestedGrid, compiled: bool, x: Tensor, h: Tensor | None) -> Tensor:
    """Steps as the CPU's search or the one for other devices finds them, each on this CPU."""
    top, low, high = float(grid.high), float(grid.low - grid.middle), float(grid.high - grid.middle)
    if compiled:
        if grid.scheme.symmetric:
            return module._symmetric(grid, x, h)
        return torch.stack(
            (module._with_zero_point if grid.scheme.grid == "affine" else module._with_minimum)(grid, x, h)
        )
    parts = list(module._parts(x, h))
    ratios = _ratios(grid.scheme, x.shape[1], alike=h is None)
    if grid.scheme.symmetric:
        ends = (low,) if low == -high else (low, high)
        factors = torch.tensor([end * ratio for ratio in ratios for end in ends])
        return torch.cat([module.symmetric_steps(*part, factors, low, high) for part in parts])
    factors = torch.tensor([1 / (top * ratio) for ratio in ratios])
    if grid.scheme.grid == "affine":
        shifts = torch.tensor((-1.0, 0.0, 1.0) if grid.scheme.bits < 8 else (0.0,))
        return torch.cat([module.zero_point_steps(*part, factors, shifts, top) for part in parts], dim=1)
    return torch.cat([module.minimum_steps(*part, factors, top, grid.scheme.nested) for part in parts], dim=1)


def test_so_many_groups_at_a_time_find_what_all_at_once_find(monkeypatch: pytest.MonkeyPatch) -> None:
    x, h = torch.randn(350, 32), torch.rand(5, 32) + 0.1
    ((whole, counts),) = module._parts(x, h)
    monkeypatch.setattr(module, "_CHUNK", 5 * 32 * 3)
    parts = list(module._parts(x, h))
    assert len(parts) > 10
    assert torch.equal(torch.cat([part for part, _ in parts], dim=1), whole)
    assert torch.equal(torch.cat([part for _, part in parts], dim=1), counts)
    assert torch.equal(counts, h.repeat(70, 1).T)


@pytest.mark.parametrize("size", [3, 8, 16, 24, 50, 64, 512])
def test_sums_have_one_order(size: int) -> None:
    values = torch.randn(size, 33, generator=torch.Generator().manual_seed(size))
    rows = torch.cat((values, torch.zeros(-size % 4, 33))).T.contiguous()
    found = _sum(values.clone())
    assert torch.equal(found, by_quads(rows).squeeze(1))
    exact = [math.fsum(row) for row in rows.tolist()]
    assert found.tolist() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["q4_0", "w4g64", "w4g128", "w4row", "q5_0", "q8_0", "w8g128", "w8row"])
@pytest.mark.parametrize("count", [8, 350])
def test_one_pass_is_a_search_and_a_rounding(scheme: str, dtype: torch.dtype, count: int) -> None:
    grid = grid_for(parse_scheme(scheme))
    size = max(grid.scheme.group_size, 0) or 256
    x = groups(size, max(count, 9), torch.Generator().manual_seed(3))[:count]
    x[8:9] *= 1e-30  # float16 can say it again
    x = x.to(dtype).reshape(count // 2, 2, size)
    found = nearest(grid, x)
    assert found is not None
    params = search(grid, x.float(), None)
    codes, lost = round_to(grid, x.float(), params)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1]["scales"], params["scales"])
    assert found[2] == pytest.approx(lost, rel=1e-9)


@pytest.mark.parametrize("counts", [None, 5])
@pytest.mark.parametrize("scheme", ["q4_0", "q8_0"])
def test_groups_of_next_to_nothing_have_no_scale(scheme: str, counts: int | None) -> None:
    """Extremes whose inverse, or a span's over it, is infinite."""
    grid, generator = grid_for(parse_scheme(scheme)), torch.Generator().manual_seed(4)
    x = torch.randn(6, 32, generator=generator) * torch.tensor([1e-45, 1e-40, 1e-38, 1e-35, -1e-39, 1e-31])[:, None]
    x[:, 3] = 0  # times an infinite inverse, no number
    h = None if counts is None else torch.rand(counts, 32, generator=generator) + 0.1
    compiled, with_tensors = (both(grid, place, x, h) for place in (True, False))
    assert torch.equal(compiled.view(torch.int32), with_tensors.view(torch.int32))
    assert not half(compiled).any()
    if h is None:
        found = nearest(grid, x[:, None])
        assert found is not None
        codes, lost = round_to(grid, x[:, None], search(grid, x[:, None], None))
        assert torch.equal(found[0], codes)
        assert found[2] == pytest.approx(lost, rel=1e-9)


def test_one_pass_is_for_symmetric_grids_whose_values_are_finite() -> None:
    x = torch.randn(4, 2, 32)
    for scheme in ("q4_1", "w4g32-asym"):
        assert nearest(grid_for(parse_scheme(scheme)), x) is None
    grid = grid_for(parse_scheme("q4_0"))
    assert nearest(grid, x.half()) is None
    assert nearest(grid, torch.randn(4, 2, 30)) is None
    for value in (math.nan, math.inf, -math.inf):
        for dtype in (torch.bfloat16, torch.float32):
            bad = x.to(dtype, copy=True)
            bad[3, 1, 31] = value
            assert nearest(grid, bad) is None
    with pytest.raises(InputError, match="beyond float16"):
        nearest(grid, x * 1e8)
