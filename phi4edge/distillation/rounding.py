"""Learned rounding: the codes and steps of a solved block, moved by gradient towards what full precision puts out.

    min mean_t ‖ô_t − o_t‖² / ‖o_t‖²

    ô_t   the quantized block's output for token t, of what the quantized blocks before it put out
    o_t   what it should be: a part α from the full-precision block in the full-precision model, the rest from it on the
          same inputs as the quantized one

so the block answers for what its linears make of each other's errors, through gates, softmax and norms, which no layer
objective sees; and for a part of the errors before it, as the solver's full-precision targets do. α is theirs: how
errors of earlier blocks hang on a block's inputs is learnt from the calibration text, and does not carry over whole to
other text. A token counts by the relative error of its residual, as the norm that reads it does.

Behind every code q stands a latent position c; q = round(c), and the backward pass goes straight through the rounding
(as in "AutoRound", arXiv 2309.05516). What differs from it on purpose: c begins not at the weight but where the
solver's own objective, with all other codes fixed, would have it,

    c = q + (E H)_ri / (H_ii a)          |c − q| < ½ where the solver's sweeps have settled

so codes that the layer objective hardly cares about turn first; and c moves by Adam rather than by the gradient's
sign, so that what is noise between batches goes to and fro. Gradients are divided by their own size in a row before.
Group scales and minima move beside the codes, as in tuning. Norm gains stay: they are tuning's.
"""

from __future__ import annotations

__all__ = ["BlockSamples", "Latent", "Rounded", "learn_rounding", "resting_places"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.recipe import RoundingRecipe
from phi4edge.distillation.adam import adam_step, learning_rate, new_state
from phi4edge.distillation.block import BlockRunner
from phi4edge.distillation.codes import codes_of
from phi4edge.distillation.parameters import QuantizedBlock, gradients_of_theta, values_of
from phi4edge.model.rope import Rotary
from phi4edge.quant.grid import grid_for
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.parallel import SMALL_PIECE, row_pieces, run_parallel

_ROWS = 256  # rows whose resting places are found at a time
_EDGE = 0.49  # how near to the next code a latent position begins at most
_BETA1, _BETA2 = 0.9, 0.95
_EVALUATIONS = 2  # on held-out samples after the start


@dataclass(frozen=True)
class BlockSamples:
    """What goes into a block and should come out of it."""

    inputs: Callable[[list[int]], Tensor]  # of some samples, [count, length, hidden] float32
    outputs: Callable[[list[int]], Tensor]
    kept: int  # samples 0 … kept − 1 are learned from
    total: int  # and the others say whether it helped


@dataclass(frozen=True)
class Rounded:
    """The block after learning, the best state on held-out samples: the one it began with if nothing was better."""

    block: QuantizedBlock
    record: dict[str, Any]


def resting_places(weight: Tensor, hessian: Tensor, linear: QuantizedLinear) -> Tensor:
    """c − q of every code, [out, in] float16, where ``linear`` was solved for ``weight`` under H, ``hessian``."""
    H = hessian
    a, _ = grid_for(linear.scheme).steps(linear.params)
    size = linear.in_features // a.shape[1]
    per_column = H.diagonal().clamp_min(1e-30).reciprocal()

    def piece(start: int) -> Tensor:
        rows = slice(start, start + _ROWS)
        pull = (weight[rows] - linear.rows(start, start + _ROWS).dequantize()) @ H
        step = a[rows].repeat_interleave(size, dim=1)
        place = pull.mul_(per_column) / torch.where(step == 0, torch.inf, step)
        return place.nan_to_num_(0.0).clamp_(-_EDGE, _EDGE).to(torch.float16)

    return torch.cat(run_parallel([partial(piece, start) for start in range(0, linear.out_features, _ROWS)]))


def learn_rounding(
    block: QuantizedBlock,
    places: Mapping[str, Tensor],
    samples: BlockSamples,
    rotary: Rotary,
    config: ModelConfig,
    recipe: RoundingRecipe,
) -> Rounded:
    """``block`` after ``recipe.passes`` over the samples that are learned from.

    ``places`` by the linear's name, as :func:`resting_places` gives them; they are used up. RAM beside the block: its
    weights as products take them and their gradients in float32, six bytes a weight of state, and a sample's graph.
    """
    learner = _Learner(block, places, samples, rotary, config)
    steps = max(1, math.ceil(recipe.passes * samples.kept / recipe.batch))
    marks = {round(steps * (i + 1) / _EVALUATIONS) for i in range(_EVALUATIONS)}
    start = learner.held_out(block)
    best, kept, heldout, losses = start, block, [{"step": 0, "error": start}], []
    for step in range(steps):
        code_rate = learning_rate(step, steps, recipe.code_rate)
        rate = learning_rate(step, steps, recipe.learning_rate)
        losses.append(learner.step(step, _batch(step, samples.kept, recipe), code_rate, rate))
        if step + 1 in marks:
            current = learner.current()
            error = learner.held_out(current)
            heldout.append({"step": step + 1, "error": error})
            if error < best:
                best, kept = error, current
    moved = sum(int((a.codes != b.codes).sum()) for a, b in zip(block.linears, kept.linears, strict=True))
    weights = sum(linear.codes.numel() for linear in block.linears)
    kept_step = min(heldout, key=lambda h: (h["error"], h["step"]))["step"]
    record = {
        "steps": steps,
        "kept_step": kept_step,
        "heldout": heldout,
        "losses": losses,
        "codes_moved": moved / weights,
    }
    return Rounded(kept, record)


def _batch(step: int, kept: int, recipe: RoundingRecipe) -> list[int]:
    """Samples of a step: every pass in an order of its own, batches running on across passes."""
    order: dict[int, list[int]] = {}
    found = []
    for i in range(step * recipe.batch, (step + 1) * recipe.batch):
        turn = i // kept
        if turn not in order:
            generator = torch.Generator().manual_seed(1_000_003 * recipe.seed + turn)
            order[turn] = torch.randperm(kept, generator=generator).tolist()
        found.append(order[turn][i % kept])
    return found


class Latent:
    """Latent positions c of a linear's codes, as c − q from the codes it begins with, and the moments of their Adam."""

    def __init__(self, linear: QuantizedLinear, places: Tensor) -> None:
        """``places`` [out_features, in_features] float16 are moved in place."""
        self._linear, self._places = linear, places
        self._moments = torch.zeros(2, *places.shape, dtype=torch.float16)
        rows, columns = places.shape
        self._pieces = row_pieces(rows, columns, max(1, SMALL_PIECE // columns))

    def codes(self) -> Tensor:
        """What the positions round to, [out_features, in_features] uint8."""
        return codes_of(self._linear, self._places)

    def move(self, steps: Tensor, dW: Tensor, step: int, rate: float) -> None:
        """Step ``step`` (from 0), against ``dW``, the gradient of the weight; ``steps`` a [out_features, groups]."""

        def piece(rows: slice) -> None:
            g = (dW[rows].reshape(*steps[rows].shape, -1) * steps[rows, :, None]).reshape(-1, dW.shape[1])
            g.div_(g.square().mean(1, keepdim=True).sqrt_().clamp_min_(1e-30)).clamp_(-200, 200)
            first = torch.lerp(g, self._moments[0, rows].float(), _BETA1)
            second = torch.lerp(g.square_(), self._moments[1, rows].float(), _BETA2)
            self._moments[0, rows], self._moments[1, rows] = first, second
            second.div_(1 - _BETA2 ** (step + 1)).sqrt_().add_(1e-4)
            place = self._places[rows].float()
            self._places[rows] = place.addcdiv_(first, second, value=-rate / (1 - _BETA1 ** (step + 1)))

        run_parallel([partial(piece, rows) for rows in self._pieces])


class _Learner:
    """Latent positions and steps of a block, and the optimizer's state of both."""

    def __init__(
        self,
        block: QuantizedBlock,
        places: Mapping[str, Tensor],
        samples: BlockSamples,
        rotary: Rotary,
        config: ModelConfig,
    ) -> None:
        self._block, self._samples, self._rotary, self._config = block, samples, rotary, config
        self._latent = {n.name: Latent(n, places[n.name]) for n in block.linears}
        self._continuous = {n: c for n, c in block.continuous.items() if n not in block.gains}
        self._states = {n: new_state(c.start) for n, c in self._continuous.items()}

    def current(self) -> QuantizedBlock:
        """The block as it is now."""
        values = values_of(self._continuous, {name: state[0] for name, state in self._states.items()})
        codes = {name: latent.codes() for name, latent in self._latent.items()}
        return self._block.with_values(values | dict(self._block.gains), codes)

    def held_out(self, block: QuantizedBlock) -> float:
        """The objective on the samples kept aside."""
        runner = BlockRunner(block, self._rotary, self._config)
        errors = []
        for sample in range(self._samples.kept, self._samples.total):
            aim = self._samples.outputs([sample])
            off = runner.forward(self._samples.inputs([sample])) - aim
            errors.append(float((off.square().sum(-1) / _energy(aim)).mean()))
        return sum(errors) / max(len(errors), 1)

    def step(self, step: int, batch: list[int], code_rate: float, rate: float) -> float:
        """Move everything once; the objective on the batch before."""
        block, losses = self.current(), list[float]()
        runner = BlockRunner(block, self._rotary, self._config)

        def slope_of(number: int, out: Tensor) -> Tensor:
            aim = self._samples.outputs([batch[number]])
            off, energy = out - aim, _energy(aim)
            losses.append(float((off.square().sum(-1) / energy).mean()))
            return off.mul_(2 / (len(batch) * energy.numel()) / energy[..., None])

        gradients, of_weights = runner.learn((self._samples.inputs([sample]) for sample in batch), slope_of)
        for name, gradient in gradients_of_theta(self._continuous, gradients).items():
            self._states[name] = adam_step(self._states[name], gradient, step, rate)
        for linear in block.linears:
            a, _ = grid_for(linear.scheme).steps(linear.params)
            self._latent[linear.name].move(a, of_weights.pop(linear.name), step, code_rate)
        return sum(losses) / len(losses)


def _energy(aim: Tensor) -> Tensor:
    return aim.square().sum(-1).clamp_min_(1e-30)
