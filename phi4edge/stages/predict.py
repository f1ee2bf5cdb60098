"""How long a quantization will take: its shapes × what this machine was measured to do → seconds, all estimated.

Nothing is measured or read here. What is counted, for a linear [R, n], T tokens of which a share is kept for H:

    forward   2 T R n                 each stream, and norms, attention and activation a sample at a time
    moments   T n² for H              half of a product; 2 T n² for D, or 2 T R n twice where W D is gathered
    solve     n³/3 to factor H        R n weights through the loop and the sweeps, which are not products;
              2 R n² a product        the loop's half, target, each sweep, about half for a loss
    check     2 T R n                 held-out samples, for the weight, each candidate and the stream beside, of the
              rows that are judged by
    round     6 T R n a pass          where rounding is learned; 2 T R n for what it aims at, and for what comes of it

A block is written behind the next one, and the next weights are fetched from the disk meanwhile: either costs what it
takes longer than the computing. What is left of reading is a copy and what the recipe does to weights.

A recipe may ask for what has no estimate yet; it is named, and the total is of the rest.
"""

from __future__ import annotations

__all__ = ["PARTS", "LinearRates", "Prediction", "Rates", "Work", "predict", "solver_products"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi4edge.calibration.budget import head_bytes
from phi4edge.calibration.judging import judged_rows
from phi4edge.calibration.parts import share_of_self
from phi4edge.calibration.statistics import takes_product
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.recipe import Recipe, RoundingRecipe, TuningRecipe
from phi4edge.quant.scheme import Scheme
from phi4edge.solvers._loss import LOSS_COLUMNS
from phi4edge.stages.block_solver import committed_behind

PARTS = ("read", "forward", "moments", "solve", "check", "round", "write")  # of a block, as the journal has them
_HASH = "hash"  # one more, of a block beside which the checkpoint is hashed
_ROUNDING_EVALUATIONS = 3  # of a block, on held-out samples
_EVALUATIONS = 6  # of tuning, on held-out samples: four, and one to three of halved changes
# Of the head's products in a step, which takes both models' logits twice and a gradient through the head: once both.
_HEAD_EVALUATED = 2 / 5
_STATE_BYTES = 12  # of a tuned value: itself and two moments, float32


@dataclass(frozen=True)
class LinearRates:
    """What this machine does for one of a block's linears."""

    forward: float  # FLOP/s of x Wᵀ, so many samples at a time and as the recipe computes
    dense: float  # FLOP/s of products [rows, n] [n, n] in float32
    errors: float  # the same of errors [rows, n] handed on by the solver and the refinement, which may be on tiles
    moments: float  # FLOP/s of H's sum, n² counted a token
    product: float  # FLOP/s of a product [n, tokens] [tokens, n] that is added up
    factor: float  # FLOP/s of H's factorisation, n³/3 counted
    solve: float  # seconds a weight in the solver's and the refinement's loops, products left out
    nearest: float  # seconds a weight of rounding to nearest, scales searched
    decode: float  # seconds a weight that codes are made values again
    learn: float  # seconds a weight of a step of learned rounding beside the products, where that is asked for


@dataclass(frozen=True)
class Rates:
    """What this machine was measured to do at a model's shapes."""

    linears: Mapping[str, LinearRates]  # by name within the block
    norm: float  # seconds a sample
    attention: float
    activation: float
    read: float  # bytes/s of the checkpoint as stored, from the page cache through what the recipe does to weights
    disk: float  # bytes/s of the checkpoint into the page cache
    check: float  # bytes/s of a file of the checkpoint, looked through for what is not finite, and hashed
    write: float  # bytes/s to the run's disk, synced, and hashed again
    sync: float  # seconds a file, however small
    scratch: float  # bytes/s of activations in files
    head: float  # seconds a position and word of the vocabulary: KLD and its gradient
    threads: int


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    config: ModelConfig
    recipe: Recipe
    scheme: Scheme
    stored_bytes: int  # a weight, in the checkpoint
    spill: bool  # activations live in files
    spill_tuning: bool = False  # so do tuning's states
    keep_graphs: bool = False  # tuning keeps blocks between the way forward and the way back
    files: int = 1  # of the checkpoint that are hashed at a time


@dataclass(frozen=True)
class Prediction:
    """Seconds, estimated."""

    blocks: int
    block: Mapping[str, float]  # of one block, by part
    linears: tuple[float, ...]  # of one block, by linear in order of use, its reading with it; what is written left out
    preparing: float  # tokenizing the corpus, first of all
    hashing: float  # of the checkpoint, where that comes first
    tuning: float
    not_estimated: tuple[str, ...]  # what the recipe asks for beside that

    @property
    def block_seconds(self) -> float:
        """One block."""
        return sum(self.block.values())

    @property
    def seconds(self) -> float:
        """All that is estimated."""
        return self.preparing + self.hashing + self.blocks * self.block_seconds + self.tuning

    def as_dict(self) -> dict[str, Any]:
        """The prediction as a JSON object; every number in it is an estimate and says so."""
        parts = {
            "prepare": self.preparing,
            **{part: self.blocks * self.block[part] for part in PARTS},
            _HASH: self.hashing + self.blocks * self.block[_HASH],
        }
        return {
            "seconds_estimated": self.seconds,
            "parts_seconds_estimated": parts | {"tuning": self.tuning},
            "block_seconds_estimated": self.block_seconds,
            "not_estimated": list(self.not_estimated),
        }


def predict(work: Work, rates: Rates, preparing: float = 0.0) -> Prediction:
    """What ``work`` costs at ``rates``; ``preparing`` is what was spent on that just now, and will be again."""
    config, recipe = work.config, work.recipe
    shapes = config.linear_shapes
    weights = sum(out * inp for out, inp in shapes.values())
    block = dict.fromkeys((*PARTS, _HASH), 0.0)
    linears = []
    for name, shape in shapes.items():
        found = _linear(recipe, shape, rates.linears[name], rates.threads)
        linears.append(sum(found.values()) + math.prod(shape) * work.stored_bytes / rates.read)
        for part, seconds in found.items():
            block[part] += seconds
    written = 2 * rates.sync + weights * _stored_codes(work.scheme) / 8 / rates.write  # the block's file and its line
    if recipe.corpus is not None:
        streams = 2 if recipe.full_precision_targets > 0 else 1
        samples, residual = recipe.corpus.samples, recipe.corpus.tokens * config.hidden_size * 4
        between = streams * samples * (4 * rates.norm + rates.attention + rates.activation)
        if work.spill:
            widths = 8 * config.hidden_size + 3 * (config.q_size + config.intermediate_size)
            between += streams * recipe.corpus.tokens * widths * 4 / rates.scratch
        block["forward"] += between
        linears = [seconds + between / len(shapes) for seconds in linears]
        if recipe.rounding is not None:
            block["round"] = _rounding(work, recipe.rounding, rates)
            linears[-1] += block["round"]
        written += streams * (rates.sync + residual / rates.write)
    computing = sum(block.values())
    stored = float(weights * work.stored_bytes)
    copies = stored / rates.read / (rates.threads if recipe.by_rows else 1)
    parameters = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    hashed, hashing = parameters * work.stored_bytes, 0.0
    if recipe.by_rows:  # by the same cores, from what is read to be rounded
        stored = hashed / config.num_layers
        block[_HASH] = stored / rates.check / rates.threads
        computing += block[_HASH]
    else:
        hashing = hashed / min(rates.check * work.files, rates.disk)
    block["read"] = max(copies, stored / rates.disk - computing)
    block["write"] = max(0.0, written - sum(linears[: 1 + committed_behind(by_rows=recipe.by_rows)]))
    return Prediction(
        config.num_layers,
        block,
        tuple(linears),
        preparing,
        hashing,
        _tuning(work, recipe.tuning, rates) if recipe.tuning is not None else 0.0,
        _left_out(recipe, rates),
    )


def _rounding(work: Work, rounding: RoundingRecipe, rates: Rates) -> float:
    """What a block should put out, steps towards it, what it does on samples kept aside, and the way on from it."""
    recipe = work.recipe
    assert recipe.corpus is not None
    forward, decode, weights = _through_a_block(work, rates)
    learn = sum(math.prod(shape) * rates.linears[name].learn for name, shape in work.config.linear_shapes.items())
    steps = max(1, math.ceil(rounding.passes * recipe.kept / rounding.batch))
    gathered = 2 * recipe.corpus.samples * forward + weights * work.stored_bytes / rates.read + decode
    evaluated = _ROUNDING_EVALUATIONS * (recipe.held_out * forward + decode)
    # A step makes weights of codes, goes forward and back (for the inputs and for the weights), and reduces gradients.
    return gathered + evaluated + steps * (rounding.batch * 3 * forward + 3 * decode + learn)


def _through_a_block(work: Work, rates: Rates) -> tuple[float, float, int]:
    """Seconds of a sample through a block, and of making weights of its codes; how many there are."""
    assert work.recipe.corpus is not None
    length = work.recipe.corpus.sequence_length
    forward, decode, weights = 2 * rates.norm + rates.attention + rates.activation, 0.0, 0
    for name, (rows, n) in work.config.linear_shapes.items():
        forward += 2 * length * rows * n / rates.linears[name].forward
        decode += rows * n * rates.linears[name].decode
        weights += rows * n
    return forward, decode, weights


def _stored_codes(scheme: Scheme) -> float:
    """Bits a weight in the run directory, where codes of other than four bits take a byte each."""
    return scheme.bits_per_weight if scheme.bits == 4 else scheme.bits_per_weight - scheme.bits + 8


def _linear(recipe: Recipe, shape: tuple[int, int], rates: LinearRates, threads: int) -> dict[str, float]:
    rows, n = shape
    nearest = rows * n * rates.nearest
    if recipe.corpus is None:
        return {"solve": nearest}
    length, kept, held = recipe.corpus.sequence_length, recipe.kept, recipe.held_out
    exact = recipe.full_precision_targets > 0
    gptq = recipe.method == "gptq"
    whole = gptq or recipe.whole_hessian or recipe.scales_inputs
    sample = 2 * length * rows * n / rates.forward  # seconds of one through the linear
    found = {"forward": (2 if exact else 1) * recipe.corpus.samples * sample}
    errors, products = 0.0, 0.0  # of [rows, n] with [n, n], 2 R n² each
    if whole:
        found["moments"] = kept * length * n * n / rates.moments
        errors, products = solver_products(recipe, n)
    if exact and takes_product(rows, n):
        found["moments"] += kept * sample * (1 + rates.forward / rates.product)
        products += 1  # dividing W D by H
    elif exact:
        found["moments"] += kept * 2 * length * n * n / rates.product
        products += n / rows  # dividing D by H
        errors += 1  # the weight with what comes of it
    solve = 0.0 if gptq else nearest
    if gptq or recipe.refined:
        solve += rows * n * rates.solve
    if gptq or exact:
        solve += n**3 / 3 / rates.factor
    if recipe.guard and (gptq or recipe.whole_hessian):
        judged = len(judged_rows(rows)) / rows
        found["check"] = held * (4 if exact else 3) * judged * sample
        solve += nearest * judged
    found["solve"] = solve + 2 * rows * n * n * (errors / rates.errors + products / rates.dense)
    return found


def solver_products(recipe: Recipe, n: int) -> tuple[float, float]:
    """Products [rows, n] [n, n] of the solver and the refinement: with errors, and of losses; GPTQ's own costs none."""
    gptq, refined = recipe.method == "gptq", recipe.refined
    errors = (0.5 if gptq else 0.0) + ((recipe.sweeps or 2) if refined else 0.0)
    return errors, _loss(n) * ((0 if gptq else 1) + (1 if refined else 0))


def _loss(n: int) -> float:
    """Share of a product that a loss takes: H is symmetric."""
    blocks = -(-n // LOSS_COLUMNS)
    return (blocks + 1) / (2 * blocks)


def _tuning(work: Work, tuning: TuningRecipe, rates: Rates) -> float:
    """Teacher, steps and evaluations."""
    config, recipe = work.config, work.recipe
    assert recipe.corpus is not None
    samples, length, layers = recipe.corpus.samples, recipe.corpus.sequence_length, config.num_layers
    forward, decode, weights = _through_a_block(work, rates)
    head = length * config.vocab_size * rates.head  # a sample
    steps = max(1, math.ceil(tuning.passes * recipe.kept / tuning.batch))
    # Forward, again where it was not kept, and back: once for the inputs and once for the weights.
    block = tuning.batch * (3 if work.keep_graphs else 4) * forward + (1 if work.keep_graphs else 2) * decode
    block += 2 * decode  # the weight's gradient, reduced to that of its scales
    reading = 0.0  # of the head, once
    if work.spill_tuning:
        reading = head_bytes(config) / rates.scratch
        codes = weights * _stored_codes(work.scheme) / 8
        state = weights * (work.scheme.bits_per_weight - work.scheme.bits) / 16 * _STATE_BYTES
        block += 2 * (codes + state) / rates.scratch + state / rates.write + rates.sync
    teacher = layers * (weights * work.stored_bytes * (1 / rates.read + 1 / rates.disk) + samples * forward)
    step = layers * block + tuning.batch * head + 2 * reading
    evaluation = recipe.held_out * (layers * forward + _HEAD_EVALUATED * head) + layers * decode + reading
    return teacher + steps * step + _EVALUATIONS * evaluation


def _left_out(recipe: Recipe, rates: Rates) -> tuple[str, ...]:
    asked = {
        "reading the checkpoint": math.isinf(rates.check),
        "choosing types": recipe.mix is not None,
        "output curvature": recipe.output_curvature > 0,
        "scaling inputs": recipe.scales_inputs,
        "text that the model writes": recipe.corpus is not None and share_of_self(recipe.corpus.corpus) > 0,
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)
