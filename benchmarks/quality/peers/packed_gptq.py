"""GPTQ checkpoints (v1: zero points stored less one) as written by other tools, multiplied out in float32."""

from __future__ import annotations

__all__ = ["read_gptq"]

from collections.abc import Mapping
from pathlib import Path

import torch
from dequantized import Grid, unpack_rows
from safetensors.torch import load_file
from torch import Tensor


def dequantize(tensors: Mapping[str, Tensor], linear: str, grid: Grid) -> Tensor:
    """s · (q − z) of one linear, [out_features, in_features] float32.

    qweight [in/8, out] and qzeros [groups, out/8] int32 hold eight 4-bit values a word, scales [groups, out] float16,
    g_idx [in] the group of every row. AutoGPTQ's v1 adds one to what qzeros holds.
    """
    codes = unpack_rows(tensors[f"{linear}.qweight"].t().contiguous(), grid.bits).t()  # [in, out]
    zeros = (unpack_rows(tensors[f"{linear}.qzeros"], grid.bits) + 1) & ((1 << grid.bits) - 1)  # [groups, out]
    groups = tensors[f"{linear}.g_idx"].long()
    consecutive = torch.arange(groups.numel()) // grid.group_size
    if not torch.equal(groups, consecutive):
        raise SystemExit(f"{linear}: its groups are not consecutive columns, so its bytes are not the grid's")
    weight = tensors[f"{linear}.scales"].float()[groups] * (codes - zeros[groups]).float()
    return weight.t().contiguous()


def read_gptq(folder: Path, grid: Grid) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All linears by Phi-3's names, gate and up fused where the tool split them; and the float tensors beside them."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    found = {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")}
    linears = {linear: dequantize(tensors, linear, grid) for linear in found}
    for gate in [linear for linear in found if linear.endswith(".gate_proj")]:
        mlp = gate.removesuffix(".gate_proj")
        linears[f"{mlp}.gate_up_proj"] = torch.cat([linears.pop(gate), linears.pop(f"{mlp}.up_proj")])
    others = {name: t for name, t in tensors.items() if name.endswith(".weight") and t.is_floating_point()}
    return linears, others
