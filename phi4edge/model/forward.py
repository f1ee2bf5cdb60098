"""The whole model, streamed: one block's weights in RAM at a time, whatever the model's depth."""

from __future__ import annotations

__all__ = ["EMBEDDED_ROWS", "embed", "head_logits", "stream_logits"]

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.core.events import SILENT, Progress
from phi4edge.model.block import forward_block, load_block, rms_norm, unrounded
from phi4edge.model.rope import rotary_table
from phi4edge.model.source import WeightSource

_ROWS = 16384  # rows of the head that are in RAM at a time
EMBEDDED_ROWS = 4096  # of the embedding in RAM at a time: nothing is computed on them, so no more are of use
_LOGIT_BYTES = 512 * 2**20  # logits in RAM at a time


def embed(source: WeightSource, tokens: Tensor) -> Tensor:
    """Embeddings of ``tokens`` [n, length] int64: [n, length, hidden] float32, read in slices of rows."""
    config = source.config
    flat = tokens.reshape(-1)
    out = torch.empty(flat.numel(), config.hidden_size)
    for start in range(0, config.vocab_size, EMBEDDED_ROWS):
        stop = min(start + EMBEDDED_ROWS, config.vocab_size)
        chosen = ((flat >= start) & (flat < stop)).nonzero().squeeze(1)
        if chosen.numel():
            rows = source.tensor("model.embed_tokens.weight", slice(start, stop))
            out[chosen] = rows[flat[chosen] - start]
    return out.reshape(*tokens.shape, config.hidden_size)


def head_logits(source: WeightSource, hidden: Tensor, rounded: Callable[[Tensor], Tensor] = unrounded) -> Tensor:
    """Final norm and head: hidden states [..., hidden] to logits [..., vocab], float32, the head in slices.

    ``rounded`` is applied to the head's input.
    """
    config = source.config
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    normed = rounded(rms_norm(hidden, source.tensor("model.norm.weight"), config.rms_norm_eps))
    logits = torch.empty(*hidden.shape[:-1], config.vocab_size)
    for start in range(0, config.vocab_size, _ROWS):
        stop = min(start + _ROWS, config.vocab_size)
        logits[..., start:stop] = F.linear(normed, source.tensor(name, slice(start, stop)))
    return logits


@torch.inference_mode()
def stream_logits(
    source: WeightSource,
    tokens: Tensor,
    *,
    first: int = 0,
    progress: Progress = SILENT,
    rounded: Callable[[Tensor], Tensor] = unrounded,
    rounded_head: Callable[[Tensor], Tensor] = unrounded,
) -> Iterator[Tensor]:
    """Logits of every sequence of ``tokens`` [n, length] int64, from position ``first`` on.

    ``rounded`` is applied to the inputs of the blocks' linears, ``rounded_head`` to the head's. Yields n tensors
    [length − first, vocab] float32 in order. RAM: one block, the hidden states (n · length · hidden · 4 bytes) and
    half a gibibyte of logits.
    """
    config = source.config
    rotary = rotary_table(config.rope, tokens.shape[1])
    hidden = embed(source, tokens)
    progress.start("forward", config.num_layers, "block")
    for layer in range(config.num_layers):
        progress.status(f"block {layer}")
        block = load_block(source, layer)
        for i in range(hidden.shape[0]):
            hidden[i : i + 1] = forward_block(block, hidden[i : i + 1], rotary, config, rounded)
        progress.advance()
    progress.finish()
    scored = hidden[:, first:]
    group = max(1, _LOGIT_BYTES // (max(scored.shape[1], 1) * config.vocab_size * 4))
    for start in range(0, scored.shape[0], group):
        yield from head_logits(source, scored[start : start + group], rounded_head)
