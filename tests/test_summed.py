"""Products of slices of the head: on tiles those of rounded inputs, with sums that nothing rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4edge.distillation.loss import Head
from phi4edge.model.compute import computing
from phi4edge.model.summed import add_times, times_transposed
from phi4edge.model.tiles import tiles

needs_tiles = pytest.mark.skipif(tiles() is None, reason="no bfloat16 units here, or no tiles on them")


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().double()


def near(found: Tensor, exact: Tensor) -> bool:
    return bool((found.double() - exact).norm() < 1e-5 * exact.norm())


@needs_tiles
@pytest.mark.parametrize("rows", [1, 256, 300])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_on_tiles_inputs_are_rounded_and_sums_are_not(rows: int, stored: torch.dtype) -> None:
    x, p, weight = drawn(rows, 96), drawn(rows, 70, 1), drawn(70, 96, 2).to(stored)
    sums = torch.ones(rows, 96)
    with computing("bfloat16"):
        z = times_transposed(x, weight)
        add_times(sums, p, weight)
    assert near(z, rounded(x) @ rounded(weight).T)
    assert near(sums, rounded(p) @ rounded(weight) + 1)


@needs_tiles
def test_a_slice_of_odd_height_is_multiplied_in_float32() -> None:
    p, weight, sums = drawn(20, 71), drawn(71, 96, 1), torch.zeros(20, 96)
    with computing("bfloat16"):
        add_times(sums, p, weight)
    assert near(sums, p.double() @ weight.double())


def test_in_float32_nothing_is_rounded() -> None:
    x, p, weight, sums = drawn(20, 96), drawn(20, 70, 1), drawn(70, 96, 2), torch.ones(20, 96)
    with computing("float32"):
        z = times_transposed(x, weight)
        add_times(sums, p, weight)
    assert near(z, x.double() @ weight.double().T)
    assert near(sums, p.double() @ weight.double() + 1)


@needs_tiles
def test_kld_and_its_slope_come_out_on_units_as_in_float32() -> None:
    weight = drawn(3000, 128).mul_(0.2).bfloat16()
    head = Head(lambda start, stop: weight[start:stop], len(weight), 701)  # an odd slice, and a last one
    hidden = drawn(300, 128, 1)
    reference = hidden + 0.2 * drawn(300, 128, 2)
    found = {}
    for unit in ("float32", "bfloat16"):
        with computing(unit):
            found[unit] = head.divergence(hidden, reference, gradient=True)
    (exact, slope), (values, other) = found["float32"], found["bfloat16"]
    assert slope is not None
    assert other is not None
    assert not torch.equal(values, exact), "the units were not asked"
    assert (values - exact).norm() < 0.01 * exact.norm()
    assert (other - slope).norm() < 0.05 * slope.norm()
