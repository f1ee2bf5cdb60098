"""The symmetric search computes all candidates at once, and finds what a plain loop over them finds, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4edge.quant.grid import grid_for, half
from phi4edge.quant.scheme import parse_scheme
from phi4edge.quant.search import _ratios, _sum, search


def in_torchs_order(values: Tensor) -> Tensor:
    """Sums of [n, size] over the rows: four chains of eight lanes, the chains together, then the lanes."""
    vectors = values.reshape(values.shape[0], -1, 8).unbind(1)
    whole = len(vectors) // 4 * 4
    chains = [torch.zeros_like(vectors[0]) for _ in range(4)]
    for i, vector in enumerate(vectors[:whole]):
        chains[i % 4] = chains[i % 4] + vector
    for vector in vectors[whole:]:
        chains[0] = chains[0] + vector
    lanes = ((chains[0] + chains[1]) + chains[2]) + chains[3]
    total = lanes[:, 0]
    for lane in range(1, 8):
        total = total + lanes[:, lane]
    return total[:, None]


def plain(scheme_name: str, x: Tensor, h: Tensor) -> Tensor:
    """Scales of groups ``x`` [n, size], one candidate after the other."""
    grid = grid_for(parse_scheme(scheme_name))
    low, high = float(grid.low - grid.middle), float(grid.high - grid.middle)
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    safe = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    best, scale = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)

    def ratio(above: Tensor, below: Tensor) -> Tensor:
        return torch.where(below > 0, above / below.clamp_min(1e-38), torch.zeros_like(above))

    def consider(inverse: Tensor) -> None:
        nonlocal best, scale
        q = torch.round(x * inverse).clamp(low, high)
        along, square = in_torchs_order(h * x * q), in_torchs_order(h * q * q)
        score = ratio(along * along, square)
        scale = torch.where(score > best, ratio(along, square), scale)
        best = torch.maximum(score, best)

    for step in _ratios(grid.scheme):
        consider(low * step / safe)
        if low != -high:
            consider(high * step / safe)
    for _ in range(2):
        consider(ratio(torch.ones_like(scale), scale.abs()) * scale.sign())
    return half(torch.where(extreme == 0, torch.zeros_like(scale), scale))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", ["q4_0", "w4g64", "w4g128", "q5_0", "q8_0"])
def test_all_candidates_at_once_find_what_a_loop_finds(scheme: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    size = parse_scheme(scheme).group_size
    values = torch.randn(70, 5, size, generator=generator) ** 3
    values[0] = 0  # no scale
    values[1, 0, 1:] = 0  # one weight alone
    values[2] = values[2].round()  # ties
    values[3, :, 1] = -values[3, :, 0]
    values[4] = values[4].bfloat16().float() * 1e-6
    importance = torch.rand(5, size, generator=generator) ** 4 + 1e-3 if weighted else None
    h = torch.ones(5, size) if importance is None else importance
    found = search(grid_for(parse_scheme(scheme)), values, importance)["scales"]
    expected = plain(scheme, values.reshape(-1, size), h.expand_as(values).reshape(-1, size))
    assert torch.equal(found.view(torch.int16), expected.reshape(70, 5).view(torch.int16))


@pytest.mark.parametrize("size", [8, 16, 24, 32, 40, 64, 96, 128, 512])
def test_sums_have_one_order_on_every_machine(size: int) -> None:
    values = torch.randn(size, 3, 33, generator=torch.Generator().manual_seed(size))
    rows = values.permute(1, 2, 0).reshape(-1, size).contiguous()
    found = _sum(values.clone()).reshape(-1)
    assert torch.equal(found, in_torchs_order(rows).reshape(-1))
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # where torch itself adds in that order
        assert torch.equal(found, rows.sum(1))
