"""Values rounded for bfloat16 units in one pass: the bits are torch's."""

from __future__ import annotations

import pytest
import torch

from phi4edge.model.compute import BFLOAT16, FLOAT32, computing, decoded
from phi4edge.model.tiles import in_pairs
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.rounding import round_to
from phi4edge.quant.scheme import parse_scheme
from phi4edge.quant.search import search

SCHEMES = ("w4g32", "w4g128-asym", "w8row", "q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q5_k", "q6_k")


@pytest.mark.parametrize("tokens", [1, 2, 63, 64])
def test_pairs_are_those_of_rounded_rows(tokens: int) -> None:
    rows = torch.randn(tokens, 40) * 10.0 ** torch.randint(-30, 30, (tokens, 40))
    rows[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8])  # the last two are ties
    even = torch.cat((rows, rows.new_zeros(tokens % 2, 40))).bfloat16()
    expected = torch.stack((even[0::2], even[1::2]), -1)
    for given in (rows, rows.T.contiguous().T):  # as they lie, and turned
        assert torch.equal(in_pairs(given).view(torch.int16), expected.view(torch.int16))
    assert torch.equal(in_pairs(even).view(torch.int16), expected.view(torch.int16))  # what is rounded stays


@pytest.mark.parametrize("name", SCHEMES)
def test_a_decoded_linear_has_the_bits_of_its_rounded_values(name: str) -> None:
    scheme = parse_scheme(name)
    W = torch.randn(1500, 512)  # several pieces of rows
    W[3] = 0
    grid = grid_for(scheme)
    grouped = W.reshape(len(W), scheme.groups(512, name), -1)
    params = search(grid, grouped)
    stored = {"a.codes": round_to(grid, grouped, params)[0]} | {f"a.{field}": p for field, p in params.items()}
    linear = QuantizedLinear.from_tensors("a", scheme, stored)
    with computing(BFLOAT16):
        assert torch.equal(decoded(linear).view(torch.int16), linear.dequantize().bfloat16().view(torch.int16))
    with computing(FLOAT32):
        assert torch.equal(decoded(linear), linear.dequantize())
