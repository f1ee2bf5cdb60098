"""Greedy text of a model that is streamed: at every step the most likely token, keys and values of the past kept.

One block's weights are in RAM at a time, so every token reads all weights once, for all prompts together. A token's
rotation is that of the whole text's length, which decides longrope's factors: a forward over the finished text gives
the same most likely tokens, up to float32's rounding of another order of summation.
"""

from __future__ import annotations

__all__ = ["greedy_text"]

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.events import SILENT, Progress
from phi4edge.model.block import Block, down_input, load_block, rms_norm
from phi4edge.model.forward import embed, head_logits
from phi4edge.model.rope import Rotary, apply_rotary, rotary_table
from phi4edge.model.source import WeightSource


@torch.inference_mode()
def greedy_text(
    source: WeightSource, prompts: Sequence[Sequence[int]], count: int, progress: Progress = SILENT
) -> list[list[int]]:
    """The ``count`` tokens that ``source`` puts after each of ``prompts``, none of them empty; it stops at no token.

    RAM: keys and values of every prompt and block, 8 · kv_size bytes a token, and one block.
    """
    config = source.config
    lengths = [len(prompt) + count for prompt in prompts]
    tables = [rotary_table(config.rope, length) for length in lengths]
    shapes = [(1, config.num_kv_heads, length, config.head_dim) for length in lengths]
    caches = [[(torch.empty(shape), torch.empty(shape)) for shape in shapes] for _ in range(config.num_layers)]
    texts: list[list[int]] = [[] for _ in prompts]
    new = [torch.tensor([list(prompt)]) for prompt in prompts]
    progress.start("greedy text", count, "token")
    for _ in range(count):
        flat = embed(source, torch.cat(new, dim=1))
        hidden = list(torch.split(flat, [tokens.shape[1] for tokens in new], dim=1))
        starts = [
            length - count + len(text) - x.shape[1] for length, text, x in zip(lengths, texts, hidden, strict=True)
        ]
        for layer in range(config.num_layers):
            block = load_block(source, layer)
            for row, (table, start) in enumerate(zip(tables, starts, strict=True)):
                hidden[row] = _step(block, hidden[row], table, caches[layer][row], start, config)
        chosen = head_logits(source, torch.cat([x[:, -1] for x in hidden])).argmax(dim=-1)
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)
        new = [token.reshape(1, 1) for token in chosen]
        progress.advance()
    progress.finish()
    return texts


def _step(
    block: Block, x: Tensor, table: Rotary, cache: tuple[Tensor, Tensor], start: int, config: ModelConfig
) -> Tensor:
    """The block's output for ``x`` [1, new, hidden] at positions from ``start``; their keys and values are kept."""
    qkv = F.linear(rms_norm(x, block.input_norm, config.rms_norm_eps), block.qkv)
    x = x + F.linear(_attend(qkv, table, cache, start, config), block.o)
    return x + F.linear(
        down_input(F.linear(rms_norm(x, block.post_norm, config.rms_norm_eps), block.gate_up)), block.down
    )


def _attend(qkv: Tensor, table: Rotary, cache: tuple[Tensor, Tensor], start: int, config: ModelConfig) -> Tensor:
    """As :func:`phi4edge.model.block.o_input`, with what is in ``cache`` before."""
    stop = start + qkv.shape[1]

    def heads(part: Tensor) -> Tensor:
        return part.reshape(1, qkv.shape[1], -1, config.head_dim).transpose(1, 2)

    query, key, value = (heads(p) for p in torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1))
    here = Rotary(table.cos[start:stop], table.sin[start:stop])
    keys, values = cache
    keys[:, :, start:stop], values[:, :, start:stop] = apply_rotary(key, here), value
    distance = torch.arange(start, stop)[:, None] - torch.arange(stop)[None, :]
    mask = (distance >= 0) & (distance < (config.sliding_window or stop + 1))
    repeat = config.num_heads // config.num_kv_heads
    key, value = (part[:, :, :stop].repeat_interleave(repeat, dim=1) for part in (keys, values))
    out = F.scaled_dot_product_attention(apply_rotary(query, here), key, value, attn_mask=mask)
    return out.transpose(1, 2).reshape(1, qkv.shape[1], -1)
