"""One transformer block of Phi3ForCausalLM on plain tensors, cut at the inputs of its four linears.

Between the cuts lies everything that is not a linear, so that calibration can stop before each of them,
look at its input, replace its weight and go on with what the replaced weight gives:

    x ─ qkv_input ─▶ qkv_proj ─ o_input ─▶ o_proj ─(+x)─ gate_up_input ─▶ gate_up_proj ─ down_input ─▶ down_proj ─(+)─▶
"""

from __future__ import annotations

__all__ = [
    "LINEARS",
    "Block",
    "down_input",
    "forward_block",
    "linear_name",
    "load_block",
    "load_norms",
    "o_input",
    "rms_norm",
    "unrounded",
]

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.model.rope import Rotary, apply_rotary
from phi4edge.model.source import WeightSource

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Block:
    """Weights of one block, float32."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [q + 2·kv, hidden], rows: queries, keys, values
    o: Tensor  # [hidden, q]
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2·intermediate, hidden], gate first
    down: Tensor  # [hidden, intermediate]


def linear_name(layer: int, stage: int) -> str:
    """The tensor of linear ``stage`` (0 … 3) of block ``layer``, without ".weight"."""
    return f"model.layers.{layer}.{LINEARS[stage]}"


def load_norms(source: WeightSource, layer: int) -> tuple[Tensor, Tensor]:
    """The gains of block ``layer``: before attention and before the MLP, [hidden] float32 each."""
    prefix = f"model.layers.{layer}."
    return (
        source.tensor(prefix + "input_layernorm.weight"),
        source.tensor(prefix + "post_attention_layernorm.weight"),
    )


def load_block(source: WeightSource, layer: int) -> Block:
    """Read block ``layer`` from ``source``; the only copy of its weights in RAM."""
    input_norm, post_norm = load_norms(source, layer)
    qkv, o, gate_up, down = (source.tensor(f"{linear_name(layer, stage)}.weight") for stage in range(len(LINEARS)))
    return Block(input_norm, qkv, o, post_norm, gate_up, down)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x · gain / √(mean x² + eps) over the last axis."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return gain * normed if torch.is_grad_enabled() else normed.mul_(gain)


def o_input(qkv: Tensor, rotary: Rotary, config: ModelConfig) -> Tensor:
    """Causal attention: qkv_proj's output [batch, length, q + 2·kv] to o_proj's input [batch, length, q]."""
    batch, length, _ = qkv.shape

    def heads(part: Tensor) -> Tensor:
        return part.reshape(batch, length, -1, config.head_dim).transpose(1, 2)

    query, key, value = (heads(p) for p in torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1))
    query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
    repeat = config.num_heads // config.num_kv_heads
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    mask = None
    if config.sliding_window is not None and length > config.sliding_window:
        position = torch.arange(length, device=qkv.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < config.sliding_window)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2).reshape(batch, length, -1)


def down_input(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: gate_up_proj's output [..., 2·intermediate] to down_proj's input [..., intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def unrounded(x: Tensor) -> Tensor:
    """``x`` as it is: inputs of linears in full precision."""
    return x


def forward_block(
    block: Block, x: Tensor, rotary: Rotary, config: ModelConfig, rounded: Callable[[Tensor], Tensor] = unrounded
) -> Tensor:
    """The block's output for hidden states ``x`` [batch, length, hidden] float32.

    ``rounded`` is applied to the input of every linear.
    """
    normed = rounded(rms_norm(x, block.input_norm, config.rms_norm_eps))
    x = x + F.linear(rounded(o_input(F.linear(normed, block.qkv), rotary, config)), block.o)
    normed = rounded(rms_norm(x, block.post_norm, config.rms_norm_eps))
    return x + F.linear(rounded(down_input(F.linear(normed, block.gate_up))), block.down)
