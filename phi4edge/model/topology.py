"""The block as a table: whose output channels are whose input channels, and who reads and writes the residual stream.

A factor on a column of a consumer is undone by dividing the producer's channel that arrives there, for nothing but
products with a channel lies between them: gains multiply it, attention mixes positions and not channels, silu(gate)·up
is linear in up. Source: "AWQ", arXiv 2306.00978, section 3.2, and its released pairs, which do not hold here as they
stand: with fused projections only a part of the producer's rows makes the channel, and with GQA one value channel
arrives at as many columns of o_proj as query heads share a key-value head.
"""

from __future__ import annotations

__all__ = ["LINKS", "NORMS", "RESIDUAL_READERS", "RESIDUAL_WRITERS", "Link", "up_rows", "value_rows"]

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig

NORMS = ("input_layernorm", "post_attention_layernorm")


def value_rows(config: ModelConfig) -> slice:
    """The rows of qkv_proj that make values."""
    return slice(config.q_size + config.kv_size, config.q_size + 2 * config.kv_size)


def up_rows(config: ModelConfig) -> slice:
    """The rows of gate_up_proj that make the up half."""
    return slice(config.intermediate_size, 2 * config.intermediate_size)


def _every_channel(config: ModelConfig) -> slice:
    return slice(0, config.hidden_size)


def _one_to_one(config: ModelConfig, width: int) -> Tensor:
    return torch.arange(width)


def _by_kv_head(config: ModelConfig, width: int) -> Tensor:
    """Column c of o_proj is channel c % head_dim of a query head, which reads the values of its kv head."""
    columns = torch.arange(width)
    head = columns // config.head_dim // (config.num_heads // config.num_kv_heads)
    return head * config.head_dim + columns % config.head_dim


@dataclass(frozen=True)
class Link:
    """Where the input channels of one linear come from; names are those within a block."""

    producer: str  # a norm, or the linear solved just before
    rows: Callable[[ModelConfig], slice]  # of the producer: those that make the channels, all of a norm's gain
    consumer: str
    arriving: Callable[[ModelConfig, int], Tensor]  # (config, in_features) → for each column the channel it reads

    @property
    def from_norm(self) -> bool:
        """Whether the producer is a norm."""
        return self.producer in NORMS

    def channels(self, config: ModelConfig) -> Tensor:
        """For each column of the consumer the producer's channel that it reads, [in_features] int64."""
        return self.arriving(config, config.linear_shapes[self.consumer][1])


# In order of use, as phi4edge.model.block.LINEARS.
LINKS = (
    Link("input_layernorm", _every_channel, "self_attn.qkv_proj", _one_to_one),
    Link("self_attn.qkv_proj", value_rows, "self_attn.o_proj", _by_kv_head),
    Link("post_attention_layernorm", _every_channel, "mlp.gate_up_proj", _one_to_one),
    Link("mlp.gate_up_proj", up_rows, "mlp.down_proj", _one_to_one),
)
RESIDUAL_READERS = {link.consumer: link.producer for link in LINKS if link.from_norm}  # and the norm in between
RESIDUAL_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
