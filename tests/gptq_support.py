"""Any codes at all, for the tests of the GPTQ checkpoint."""

from __future__ import annotations

import torch

from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import Scheme


def random_linear(
    scheme: Scheme, out_features: int, in_features: int, seed: int, lowest_zero: int = 0
) -> QuantizedLinear:
    """Any codes, scales of both signs from subnormal to large, zero points from ``lowest_zero`` up."""
    generator = torch.Generator().manual_seed(seed)
    grid, shape = grid_for(scheme), (out_features, scheme.groups(in_features))
    codes = torch.randint(grid.low, grid.high + 1, (out_features, in_features), generator=generator)
    exponent = torch.randint(-24, 8, shape, generator=generator)
    scales = (torch.randn(shape, generator=generator) * 2.0**exponent).half()
    params = {"scales": scales}
    if not scheme.symmetric:
        zeros = torch.randint(lowest_zero, grid.high + 1, shape, generator=generator)
        params["zeros"] = zeros.to(torch.uint8)
    return QuantizedLinear("linear", scheme, codes.to(torch.uint8), params)
