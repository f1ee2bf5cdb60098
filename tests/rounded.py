"""Quantized models for tests of artifacts: every linear rounded to nearest on scales that span its groups."""

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
    """``weight`` rounded to the nearest codes of ``scheme``, groups spanned by their extremes."""
    grid, groups = grid_for(scheme), scheme.groups(weight.shape[1])
    grouped = weight.reshape(weight.shape[0], groups, -1)
    low, high = grouped.amin(2), grouped.amax(2)
    if scheme.symmetric:
        extreme = torch.where(-low > high, low, high)  # its sign becomes the scale's, on the lowest code
        params = grid.store(extreme / (grid.low - grid.middle), extreme)
    else:
        if scheme.grid == "affine" or scheme.nested:
            low, high = low.clamp(max=0), high.clamp(min=0)
        params = grid.store((high - low) / grid.high, low)
    a, b = grid.steps(params)
    codes = grid.encode(grouped, a[:, :, None], b[:, :, None]).reshape(weight.shape)
    return QuantizedLinear(name, scheme, codes.to(torch.uint8), params)


def quantized_model(
    folder: Path, scheme_name: str, change: Callable[[QuantizedLinear], QuantizedLinear] | None = None
) -> QuantizedModel:
    """The checkpoint in ``folder`` with all linears rounded, each passed through ``change``."""
    checkpoint, scheme = open_checkpoint(folder), parse_scheme(scheme_name)
    config = checkpoint.config
    names = tuple(f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in config.linear_shapes)

    def load(name: str) -> QuantizedLinear:
        linear = rounded(name, checkpoint.tensor(f"{name}.weight"), scheme)
        return linear if change is None else change(linear)

    provenance = {"base_model": "someone/tiny-phi", "method": "rtn", "recipe": "rtn | none"}
    return QuantizedModel(checkpoint, scheme, names, load, provenance)
