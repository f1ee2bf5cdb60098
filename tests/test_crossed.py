"""Sums over tokens on bfloat16 units: the products they should be, in every shape, and where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4edge.calibration.statistics import InputMoments
from phi4edge.model import crossed
from phi4edge.model.compute import BFLOAT16, FLOAT32, computing
from phi4edge.model.crossed import Packed, Part, add_products, over_tokens
from phi4edge.model.tiles import tiles

needs_tiles = pytest.mark.skipif(tiles() is None, reason="no bfloat16 units here, or no tiles on them")


def drawn(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossed, "tiles", lambda: None)


@needs_tiles
@pytest.mark.parametrize("tokens", [1, 2, 63, 512, 1024, 2049])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (48, 300), (256, 512), (530, 17)])
def test_tiles_add_the_product_of_rounded_inputs_to_what_is_there(tokens: int, rows: int, columns: int) -> None:
    a, b = drawn(tokens, rows), drawn(tokens, columns, 1)
    with computing(BFLOAT16):
        left, right = over_tokens(a), over_tokens(b)
    assert isinstance(left, Packed)
    assert isinstance(right, Packed)
    total = torch.ones(rows, columns)
    add_products([Part(total)], left, right)
    exact = a.bfloat16().double().T @ b.bfloat16().double() + 1
    assert (total.double() - exact).norm() < 1e-5 * exact.norm()


@needs_tiles
def test_parts_of_a_symmetric_sum_are_right_on_and_above_the_diagonal() -> None:
    x, width = drawn(101, 700), 700
    with computing(BFLOAT16):
        factor = over_tokens(x)
    parts = [Part(torch.zeros(min(300, width - row), width - row), row, row) for row in range(0, width, 300)]
    add_products(parts, factor, factor, symmetric=True)
    exact = x.bfloat16().double().T @ x.bfloat16().double()
    for part in parts:
        count, _ = part.values.shape
        found, wanted = part.values.triu(), exact[part.row : part.row + count, part.column :].triu()
        assert (found.double() - wanted).norm() < 1e-5 * wanted.norm()


@needs_tiles
def test_bytes_of_a_sum_do_not_depend_on_the_number_of_threads() -> None:
    x = drawn(511, 900)
    threads, sums = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            total = torch.zeros(900, 900)
            with computing(BFLOAT16):
                factor = over_tokens(x)
            add_products([Part(total)], factor, factor)
            sums.append(total)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_in_float32_nothing_is_rounded() -> None:
    x = drawn(70, 300)
    with computing(FLOAT32):
        factor = over_tokens(x)
        assert factor is x
        total = torch.zeros(300, 300)
        add_products([Part(total)], factor, factor)
    exact = x.double().T @ x.double()
    assert (total.double() - exact).norm() < 1e-6 * exact.norm()


@needs_tiles
def test_what_would_go_beyond_an_arrays_end_is_not_called() -> None:
    with computing(BFLOAT16):
        left, right, fewer = over_tokens(drawn(20, 40)), over_tokens(drawn(20, 50)), over_tokens(drawn(18, 50))
    for part, factor in (
        (Part(torch.zeros(41, 50)), right),
        (Part(torch.zeros(40, 50), row=1), right),
        (Part(torch.zeros(40, 50), column=1), right),
        (Part(torch.zeros(40, 50, dtype=torch.float64)), right),
        (Part(torch.zeros(50, 40).T), right),
        (Part(torch.zeros(40, 50)), fewer),
    ):
        with pytest.raises(AssertionError):
            add_products([part], left, factor)


def test_no_tokens_add_nothing() -> None:
    moments = InputMoments(32, full=True)
    with computing(BFLOAT16):
        moments.add(drawn(3, 32)[:, None])  # three samples of a first position each
    H = moments.result().hessian
    assert H is not None
    assert torch.allclose(H, drawn(3, 32).T @ drawn(3, 32) / 3, atol=1e-5)


@pytest.mark.usefixtures("without_tiles")
def test_without_tiles_sums_are_those_of_addmm() -> None:
    x = drawn(70, 300)
    total, plain = torch.zeros(300, 300), torch.zeros(300, 300)
    with computing(BFLOAT16):
        add_products([Part(total)], over_tokens(x), over_tokens(x))
        plain.addmm_(x.T, x)
    assert torch.equal(total, plain)


@pytest.mark.parametrize("width", [48, 300, 2100])
def test_moments_on_the_units_are_those_of_inputs_rounded_to_bfloat16(width: int) -> None:
    """Both moments, D gathered whole and as W D; without units they are float32's, which is nearer still."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 20, width, generator=generator)
    exact = x + 0.1 * torch.randn(6, 20, width, generator=generator)
    shares = {"H": 2.0**-8, "D": 2.0**-7}  # of the norm, for one and for two roundings
    for rows in (8, width):
        W = torch.randn(rows, width, generator=generator)
        moments = InputMoments(width, full=True, exact=W)
        with computing(BFLOAT16):
            for i in range(0, 6, 2):
                moments.add(x[i : i + 2], exact[i : i + 2])
        stats = moments.result()
        assert stats.hessian is not None
        assert stats.shift is not None
        flat, away = x.reshape(-1, width).double(), (exact - x).reshape(-1, width).double()
        H, WD = flat.T @ flat / 120, W.double() @ (away.T @ flat) / 120
        assert torch.equal(stats.hessian, stats.hessian.T)
        assert (stats.hessian.double() - H).norm() < shares["H"] * H.norm()
        found = stats.shift.values if stats.shift.product else W @ stats.shift.values
        assert (found.double() - WD).norm() < shares["D"] * WD.norm()
