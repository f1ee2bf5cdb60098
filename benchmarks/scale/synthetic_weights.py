"""Weights that a quantizer meets in a trained model, drawn at about the speed of a disk.

A matrix is W = diag(rows) · (noise + L R) · diag(columns). What of a trained model this has, and on purpose:

* *heavy tails*: noise is z + κ z³ of a normal z (κ = .03: kurtosis 3.9), every value a draw of its own; scales of rows
  and columns are lognormal, so a whole matrix has a kurtosis of about 6;
* *outlier channels*: one in about a thousand channels of the residual stream is 12 to 30 times as large as the others,
  in the embedding and in all that writes into the stream; norm gains take back a part of it, as trained ones do;
* *correlated activations*: all that writes into the stream has a part in one subspace of 32 directions whose weights
  fall off as k^-.7, and all that reads from it reads that subspace a little more than others. A few of the
  intermediate channels are much more active than most;
* *a stream that neither dies nor explodes*: o_proj and down_proj write 1/√(2·depth) of what the embedding and the
  norms are made for; attention is neither flat nor a copy of one position; logits have a standard deviation near 2.5.

What it does not have: knowledge of any language, attention sinks with their massive activations at a first position,
and structure in a matrix beyond the above. Time, memory and bytes do not depend on that. Errors of rounding do: those
measured on such weights compare methods on these weights, and say nothing of a Phi-4.

A tensor depends on the seed, its name and its shape alone. A checkpoint with fewer blocks is the first blocks of the
whole one. The bytes are the same on every machine on which torch draws the same normal numbers.
"""

from __future__ import annotations

__all__ = ["SyntheticWeights"]

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig

_PIECE = 1 << 20  # weights drawn at a time: float32, they stay in a core's cache
_RANK = 32
_CUBE = 0.03  # κ
_NOISE = (1 + 6 * _CUBE + 15 * _CUBE**2) ** -0.5  # makes the variance of z + κ z³ one
_READ, _WRITTEN, _EMBEDDED = 0.02, 0.3, 0.4  # shares of a matrix' variance that lie in the subspace
_EMBEDDING = 0.02  # RMS of an embedding, outlier channels apart
_STEP = 0.35  # RMS of what a whole depth of blocks writes, as many times as there are normal channels in it
_LOGITS = 2.5


@dataclass(frozen=True)
class _Recipe:
    """One matrix: std · diag(rows) · (√(1−share) noise + √share · left · right) · diag(columns)."""

    std: float
    rows: Tensor  # [out_features]
    columns: Tensor  # [in_features]
    share: float
    left: Tensor | None  # [out_features, rank], or None: drawn with the rows
    right: Tensor  # [rank, in_features]; left · right has variance one


class SyntheticWeights:
    """Tensors of one model by name."""

    def __init__(self, config: ModelConfig, depth: int, seed: int) -> None:
        """``depth`` is the number of blocks of the whole model, whether or not ``config`` has fewer."""
        self._config, self._depth, self._seed = config, depth, seed
        hidden = config.hidden_size
        generator = self._generator("residual stream")
        outliers = torch.randperm(hidden, generator=generator)[: max(2, round(hidden / 1000))]
        loud = torch.ones(hidden)
        loud[outliers] = 12 + 18 * torch.rand(len(outliers), generator=generator)
        self._loud = loud
        self._channels = loud * _lognormal(hidden, 0.25, generator)  # of the residual stream
        strength = torch.arange(1, _RANK + 1) ** -0.7
        basis = torch.randn(_RANK, hidden, generator=generator) * strength[:, None]
        self._basis = basis / strength.norm()  # times a normal [n, rank]: variance one

    def _generator(self, *what: object) -> torch.Generator:
        digest = hashlib.sha256("/".join(map(str, (self._seed, *what))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def pieces(self, name: str) -> list[Callable[[], Tensor]]:
        """Tensor ``name`` in pieces of its rows, each made when called: bfloat16, independent of the others."""
        shape = self._config.tensor_shapes()[name]
        if len(shape) == 1:
            return [lambda: self._gain(name)]
        recipe = self._recipe(name)
        step = max(1, _PIECE // shape[1])
        return [
            partial(self._draw, name, recipe, slice(start, min(start + step, shape[0])))
            for start in range(0, shape[0], step)
        ]

    def _gain(self, name: str) -> Tensor:
        gain = _lognormal(self._config.hidden_size, 0.2, self._generator(name))
        if not name.startswith("model.norm"):
            return (gain * self._loud**-0.5).bfloat16()
        if not self._config.tie_word_embeddings:
            return (gain / self._loud).bfloat16()
        # The head is the embedding, loud channels and all.
        return (gain * _LOGITS / 2 / (_EMBEDDING * math.sqrt(self._config.hidden_size)) * self._loud**-2).bfloat16()

    def _recipe(self, name: str) -> _Recipe:
        rows, columns = self._config.tensor_shapes()[name]
        generator = self._generator(name)
        in_scale = _lognormal(columns, 0.25, generator)
        if name == "model.embed_tokens.weight":
            return _Recipe(_EMBEDDING, torch.ones(rows), self._channels, _EMBEDDED, None, self._basis)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            arriving = 2.0 if name.endswith("o_proj.weight") else 3.0  # about the RMS of their inputs
            std = _STEP / math.sqrt(2 * self._depth) / arriving / math.sqrt(columns)
            right = torch.randn(_RANK, columns, generator=generator)
            return _Recipe(std, self._channels, in_scale, _WRITTEN, self._basis.T.contiguous(), right)
        std, spread = 1 / math.sqrt(columns), 0.25
        if name.endswith("gate_up_proj.weight"):
            spread = 0.5
        elif name == "lm_head.weight":
            std *= _LOGITS / 2
        return _Recipe(std, _lognormal(rows, spread, generator), in_scale, _READ, None, self._basis)

    def _draw(self, name: str, recipe: _Recipe, rows: slice) -> Tensor:
        generator = self._generator(name, rows.start)
        weight = torch.empty(rows.stop - rows.start, recipe.columns.shape[0]).normal_(generator=generator)
        square = weight.square().mul_(_CUBE).add_(1)
        weight.mul_(square)
        left = torch.randn(weight.shape[0], _RANK, generator=generator) if recipe.left is None else recipe.left[rows]
        inside, outside = math.sqrt(recipe.share), math.sqrt(1 - recipe.share) * _NOISE
        weight.addmm_(left, recipe.right, beta=outside, alpha=inside)
        weight.mul_(recipe.columns * recipe.std).mul_(recipe.rows[rows, None])
        return weight.bfloat16()


def _lognormal(count: int, sigma: float, generator: torch.Generator) -> Tensor:
    """Positive numbers whose logarithms have standard deviation ``sigma``, with a mean square of one."""
    return torch.exp(sigma * torch.randn(count, generator=generator) - sigma**2)
