"""Quantized models for the tests of the GPTQ checkpoint: rounded to nearest, or any codes at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import Scheme, parse_scheme


def rounded(name: str, weight: Tensor, scheme: Scheme) -> QuantizedLinear:
    """``weight`` on ``scheme``'s grid; symmetric scales take the sign that puts the extreme on the lowest code."""
    grid, groups = grid_for(scheme), scheme.groups(weight.shape[1])
    grouped = weight.reshape(weight.shape[0], groups, -1)
    if scheme.symmetric:
        extreme = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
        params = {"scales": (extreme / (grid.low - grid.middle)).half()}
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = ((high - low) / grid.high).half()
        zeros = torch.round(-low / scales.float()).clamp(0, grid.high)
        params = {"scales": scales, "zeros": zeros.to(torch.uint8)}
    a, b = grid.steps(params)
    codes = grid.encode(grouped, a[:, :, None], b[:, :, None]).reshape(weight.shape)
    return QuantizedLinear(name, scheme, codes.to(torch.uint8), params)


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


def quantized_model(
    folder: Path, scheme_name: str, change: Callable[[QuantizedLinear], QuantizedLinear] | None = None
) -> QuantizedModel:
    """The checkpoint in ``folder`` with all linears rounded to nearest, each passed through ``change``."""
    checkpoint, scheme = open_checkpoint(folder), parse_scheme(scheme_name)
    config = checkpoint.config
    names = tuple(f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in config.linear_shapes)

    def load(name: str) -> QuantizedLinear:
        linear = rounded(name, checkpoint.tensor(f"{name}.weight"), scheme)
        return linear if change is None else change(linear)

    return QuantizedModel(checkpoint, scheme, names, load, {"base_model": "someone/tiny-phi", "recipe": "rtn | none"})
