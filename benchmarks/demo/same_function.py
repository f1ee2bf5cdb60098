"""Changes of a model's weights that keep its function: rescaling, widening, fusing; all in float32."""

from __future__ import annotations

__all__ = ["fuse", "pad", "rescale", "shared_grid_fraction"]

import math
from dataclasses import replace

import torch
from smollm2 import Architecture, Weights
from torch import Tensor

from phi4edge.core.errors import InputError


def rescale(arch: Architecture, weights: Weights, strength: float, seed: int, *, tied: bool = False) -> Weights:
    """The same function with every matrix of a block (and an untied head) moved off its grid.

    With a tied head the last norm stays as it is, because its columns are the embedding's.
    """
    generator = torch.Generator().manual_seed(seed)

    def scales(count: int) -> Tensor:
        exponents = (2 * torch.rand(count, generator=generator) - 1) * strength
        return exponents.double().exp().float()  # float32 would differ by CPU, and the checkpoint with it

    result = dict(weights)

    def norm_into(norm: str, *readers: str) -> None:
        s = scales(arch.hidden)
        result[norm] = result[norm] * s
        for reader in readers:
            result[reader] = result[reader] / s

    for i in range(arch.layers):
        norm_into(f"{i}.attn_norm", f"{i}.q", f"{i}.k", f"{i}.v")
        s = scales(arch.kv_heads * arch.head_dim)
        shared = s.reshape(arch.kv_heads, 1, arch.head_dim).expand(-1, arch.heads // arch.kv_heads, -1).flatten()
        result[f"{i}.v"] = result[f"{i}.v"] * s[:, None]
        result[f"{i}.o"] = result[f"{i}.o"] / shared
        norm_into(f"{i}.ffn_norm", f"{i}.gate", f"{i}.up")
        s = scales(arch.intermediate)
        result[f"{i}.up"] = result[f"{i}.up"] * s[:, None]
        result[f"{i}.down"] = result[f"{i}.down"] / s
    if not tied:
        norm_into("norm", "head")
    return result


def pad(arch: Architecture, weights: Weights, hidden: int) -> tuple[Architecture, Weights]:
    """The same function at width ``hidden``: zero channels spread among the real ones, empty heads at the end.

    RMSNorm divides by the root of a mean over the width, so gains take the factor √(old/new) and eps old/new.

    Raises:
        InputError: ``hidden`` is not a wider multiple of a head group's width.
    """
    old, group = arch.hidden, arch.head_dim * (arch.heads // arch.kv_heads)
    if hidden <= old or hidden % group:
        raise InputError(
            f"--pad-hidden {hidden}: not a multiple of {group} (a kv head's query heads) above {old}",
            f"for example {old + group}",
        )
    kv_heads = hidden // group
    heads = kv_heads * (arch.heads // arch.kv_heads)
    channels = torch.arange(old) * hidden // old  # where each real channel goes
    wider = replace(arch, hidden=hidden, heads=heads, kv_heads=kv_heads, eps=arch.eps * old / hidden)

    def columns(weight: Tensor) -> Tensor:
        return torch.zeros(weight.shape[0], hidden).index_copy_(1, channels, weight)

    def more_rows(weight: Tensor, rows: int) -> Tensor:
        return torch.cat((weight, torch.zeros(rows - weight.shape[0], weight.shape[1])))

    def gain(weight: Tensor) -> Tensor:
        return torch.ones(hidden).index_copy_(0, channels, weight) * math.sqrt(old / hidden)

    result = {"embed": columns(weights["embed"]), "norm": gain(weights["norm"]), "head": columns(weights["head"])}
    q_rows, kv_rows = heads * arch.head_dim, kv_heads * arch.head_dim
    for i in range(arch.layers):
        result[f"{i}.attn_norm"] = gain(weights[f"{i}.attn_norm"])
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            result[f"{i}.{name}"] = more_rows(columns(weights[f"{i}.{name}"]), rows)
        # o reads heads and writes channels: both sides grow.
        result[f"{i}.o"] = columns(more_rows(weights[f"{i}.o"].t(), q_rows)).t().contiguous()
        result[f"{i}.ffn_norm"] = gain(weights[f"{i}.ffn_norm"])
        for name in ("gate", "up"):
            result[f"{i}.{name}"] = columns(weights[f"{i}.{name}"])
        result[f"{i}.down"] = columns(weights[f"{i}.down"].t()).t().contiguous()
    return wider, result


def fuse(arch: Architecture, weights: Weights, *, tied: bool = False) -> Weights:
    """The weights under Phi3ForCausalLM's tensor names, q, k, v and gate, up stacked."""
    result = {"model.embed_tokens.weight": weights["embed"]}
    for i in range(arch.layers):
        prefix = f"model.layers.{i}."
        result[prefix + "input_layernorm.weight"] = weights[f"{i}.attn_norm"]
        result[prefix + "self_attn.qkv_proj.weight"] = torch.cat([weights[f"{i}.{n}"] for n in "qkv"])
        result[prefix + "self_attn.o_proj.weight"] = weights[f"{i}.o"]
        result[prefix + "post_attention_layernorm.weight"] = weights[f"{i}.ffn_norm"]
        result[prefix + "mlp.gate_up_proj.weight"] = torch.cat([weights[f"{i}.gate"], weights[f"{i}.up"]])
        result[prefix + "mlp.down_proj.weight"] = weights[f"{i}.down"]
    result["model.norm.weight"] = weights["norm"]
    if not tied:
        result["lm_head.weight"] = weights["head"]
    return result


def shared_grid_fraction(weight: Tensor, group: int = 32) -> float:
    """Share of the groups of ``group`` consecutive weights that lie on 16 equidistant levels (as of Q4_1).

    The tolerance, 4 % of a step, admits values that were rounded to bfloat16; of 32 free values all
    come that near to a level with probability .08^30.
    """
    values = weight.float().reshape(-1, group)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    on_grid = torch.zeros(len(values), dtype=torch.bool)
    for steps in range(1, 16):  # how many steps the group's own values span
        position = (values - low) / ((high - low) / steps).clamp_min(1e-30)
        on_grid |= ((position - position.round()).abs() < 0.04).all(1)
    return float(on_grid.float().mean())
