"""Grids: what is stored for a step comes back as that step."""

from __future__ import annotations

import pytest
import torch

from phi4edge.core.errors import InputError
from phi4edge.quant.grid import Grid, grid_for
from phi4edge.quant.scheme import parse_scheme
from phi4edge.quant.search import search

SCHEMES = ["w4g32", "w4row", "w4g32-asym", "w8g32", "w8g64-asym", "q4_0", "q4_1", "q8_0"]


def searched(name: str, seed: int = 0) -> tuple[Grid, dict[str, torch.Tensor]]:
    """A grid and parameters found for random weights, of both signs and some of them far off zero."""
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 256, generator=generator) + torch.randn(20, 1, generator=generator)
    grid = grid_for(scheme)
    return grid, dict(search(grid, weight.reshape(20, scheme.groups(256), -1)))


@pytest.mark.parametrize("name", SCHEMES)
def test_steps_that_are_on_the_grid_are_stored_as_they_are(name: str) -> None:
    grid, params = searched(name)
    stored = grid.store(*grid.steps(params))
    assert list(stored) == list(grid.fields)
    for field in grid.fields:
        assert torch.equal(stored[field], params[field]), field


@pytest.mark.parametrize("name", SCHEMES)
def test_stored_steps_are_near_those_wanted(name: str) -> None:
    grid, params = searched(name)
    a, b = grid.steps(params)
    generator = torch.Generator().manual_seed(1)
    a = a * (1 + 0.1 * torch.randn(a.shape, generator=generator))
    zero = params.get("zeros")
    b = -a * grid.middle if grid.scheme.symmetric else b * 1.05 if zero is None else -a * (zero + 0.3)
    stored_a, stored_b = grid.steps(grid.store(a, b))
    assert torch.allclose(stored_a, a, rtol=2**-11, atol=2**-25)
    if zero is None:
        assert torch.allclose(stored_b, b, rtol=2**-11, atol=2**-25)
    else:
        assert bool(((stored_b - b).abs() <= 0.51 * stored_a.abs()).all())


@pytest.mark.parametrize("name", SCHEMES)
def test_tunable_fields_are_the_float16_ones(name: str) -> None:
    grid, params = searched(name)
    assert grid.tunable == tuple(field for field in grid.fields if params[field].dtype == torch.float16)


def test_a_step_of_zero_is_stored() -> None:
    for name in SCHEMES:
        grid = grid_for(parse_scheme(name))
        nothing = torch.zeros(2, 3)
        assert all(not step.any() for step in grid.steps(grid.store(nothing, nothing))), name


def test_a_step_beyond_float16_is_refused() -> None:
    with pytest.raises(InputError, match="needs a scale of 7e\\+04, beyond float16's 65504"):
        grid_for(parse_scheme("q4_0")).store(torch.tensor([[7e4]]), torch.tensor([[-5.6e5]]))
