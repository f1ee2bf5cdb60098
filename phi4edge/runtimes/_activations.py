"""Inputs of linears rounded to 8 bits as serving runtimes do it before they multiply with integer weights.

A token's values in blocks of neighbouring channels, x̂ = d·round(x·127 / max|x|), d = max|x| / 127 of the block:

=========  ======  =======  ==========================================================================
name       block   d        who
=========  ======  =======  ==========================================================================
q8_0       32      float16  llama.cpp for Q4_0, Q5_0 and Q8_0 weights
q8_k       256     float32  llama.cpp for K-quants
int8-b32   32      float32  ONNX Runtime's MatMulNBits at accuracy_level 4, its block being the weights'
=========  ======  =======  ==========================================================================

and ``int8-b64``, ``int8-b128`` likewise. Sources: quantize_row_q8_0 and quantize_row_q8_K of ggml (codes of the latter
have the sign turned, values have not), QuantizeARow_CompInt8 of MLAS. Products and sums stay float32 here, where the
runtimes add whole numbers block by block. For Q4_1 and Q5_1 weights llama.cpp rounds to Q8_1, which is Q8_0 with the
block's sum beside it in float16; that second rounding is not simulated.

A value at a tie may fall to the other side in the runtime, and whatever follows it is rounded anew: it is drift, its
mean and quantiles over a text, that simulation and runtime have in common, not every logit.
"""

from __future__ import annotations

__all__ = ["activation_refusal", "rounding_of"]

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.model.block import unrounded

# Block, dtype of d, and whether a row may end within a block.
_KINDS = {
    "q8_0": (32, torch.float16, False),
    "q8_k": (256, torch.float32, False),
    "int8-b32": (32, torch.float32, True),
    "int8-b64": (64, torch.float32, True),
    "int8-b128": (128, torch.float32, True),
}


def rounding_of(name: str) -> Callable[[Tensor], Tensor]:
    """What activations ``name`` make of inputs [..., in_features] float32; "none" leaves them as they are."""
    if name == "none":
        return unrounded
    block, dtype, _ = _KINDS[name]
    return partial(_rounded, block=block, dtype=dtype)


def _rounded(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    width = x.shape[-1]
    blocks = F.pad(x, (0, -width % block)).reshape(*x.shape[:-1], -1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
    return (codes * (largest / 127).to(dtype).float()).flatten(-2)[..., :width]


def activation_refusal(name: str, config: ModelConfig) -> str | None:
    """Why the linears of a model cannot take activations ``name``, or None when they can."""
    if name == "none":
        return None
    block, _, partial_rows = _KINDS[name]
    for linear, (_, columns) in config.linear_shapes.items():
        if columns % block and not partial_rows:
            return f"{linear}: in_features {columns} is not divisible by {block}, the values in a {name} block"
    return None
