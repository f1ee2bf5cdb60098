"""RAM, planned before the first tensor is read: what must be there, and what moves to disk to keep a budget."""

from __future__ import annotations

__all__ = ["TUNING_PIECE_TOKENS", "MemoryPlan", "head_bytes", "head_rows", "plan_memory", "tuned_values"]

import os
from dataclasses import dataclass

from phi4edge.calibration.budget_solving import solving_bytes
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import TargetError
from phi4edge.core.memory import available_bytes, format_bytes, rss_bytes
from phi4edge.core.recipe import BFLOAT16, Recipe, TuningRecipe
from phi4edge.model.crossed import packed_bytes
from phi4edge.quant.parallel import SMALL_PIECE
from phi4edge.quant.scheme import parse_scheme

_SLACK = 256 * 2**20  # allocator, buffers of BLAS, the progress display
TUNING_PIECE_TOKENS = 1024  # of a tuning batch, forward and backward together
_OF_A_SCALE = 11  # values: where it began, its unit, itself twice, its gradient, three of a state, twice
_MOVED = 6  # values that are in work for each of the weights whose rounding a core learns at a time
_HEAD_WEIGHTS, _HEAD_ROWS = 2**24, 8192  # of the head, multiplied at a time, at the most
_DEFAULT_SHARE = 0.6  # of the available RAM, where no budget is given


@dataclass(frozen=True)
class MemoryPlan:
    """How a run keeps to its budget; all sizes in bytes."""

    budget: int
    least: int  # the smallest budget that this run could keep
    expected: int  # planned peak RSS
    spill: bool  # activations live in files, not in RAM
    keep_graphs: bool = False  # while tuning, blocks stay in RAM between the way forward and the way back
    spill_tuning: bool = False  # so do codes, optimizer states and what lies between blocks while tuning


def plan_memory(config: ModelConfig, recipe: Recipe, budget: int | None, by_rows: bool | None = None) -> MemoryPlan:
    """Choose where activations live; what is computed together never depends on the budget, so neither do the codes.

    ``by_rows``: no weight is in RAM as a whole; by default, where the recipe allows that.

    Raises:
        TargetError: the budget is below the least that would do.
    """
    base = rss_bytes() + _SLACK
    block = 4 * sum(out * columns for out, columns in config.linear_shapes.values())
    least = base + solving_bytes(config, recipe, by_rows=recipe.by_rows if by_rows is None else by_rows)
    limit = _limit(budget)
    if recipe.corpus is None:
        _check(limit, least)
        return MemoryPlan(limit, least, least, False)
    streams = 2 if recipe.full_precision_targets else 1
    stores = streams * recipe.corpus.tokens * (config.hidden_size + config.q_size + config.intermediate_size) * 4
    square = config.hidden_size**2 * 4  # F of a linear that writes into the residual stream
    solving = least
    if recipe.rounding is not None:
        stores += 2 * recipe.corpus.tokens * config.hidden_size * 4  # what went into the block, and should come out
        least = max(least, base + _learning(config, recipe))
    tuning, tuning_stores = _tuning(config, recipe, recipe.tuning, base + 2 * block) if recipe.tuning else (0, 0)
    if recipe.mix is not None:  # sensitivity goes back through one block at a time as well; its stores are files
        tuning = max(tuning, base + block + _backward(config, recipe))
    if recipe.output_curvature:  # so does curvature, with two F, and both as they are put away
        tuning = max(tuning, base + block + _backward(config, recipe) + 4 * square)
    needed = max(least, tuning)
    _check(limit, needed, less="--round-passes 0" if max(solving, tuning) < needed else None)
    spill, spill_tuning = least + stores > limit, tuning + tuning_stores > limit
    tuning_expected = tuning + (0 if spill_tuning else tuning_stores)
    graphs = _graphs(config, recipe, recipe.tuning) if recipe.tuning else 0
    keep_graphs = bool(graphs) and tuning_expected + graphs <= limit
    expected = max(least + (0 if spill else stores), tuning_expected + (graphs if keep_graphs else 0))
    return MemoryPlan(limit, needed, expected, spill, keep_graphs, spill_tuning)


def head_rows(config: ModelConfig) -> int:
    """Rows of the head that are multiplied at a time, and so how many logits of a position are in RAM."""
    return min(_HEAD_ROWS, max(1, _HEAD_WEIGHTS // config.hidden_size))


def head_bytes(config: ModelConfig) -> int:
    """Size of the head as backward passes keep it."""
    return config.vocab_size * config.hidden_size * 2


def tuned_values(config: ModelConfig, recipe: Recipe) -> int:
    """How many scales and minima tuning moves, at the most: as if all that is stored beside the codes were float16."""
    names = [recipe.scheme, *(scheme for _, scheme in recipe.types)]
    schemes = [parse_scheme(name) for name in (names if recipe.mix is None else recipe.mix.candidates)]
    rows = config.num_layers * sum(out for out, _ in config.linear_shapes.values())  # where a row has but one scale
    return rows + int(config.linear_parameters * max(s.bits_per_weight - s.bits for s in schemes) / 16)


def _kept_by_autograd(config: ModelConfig) -> int:
    """Bytes a token that the graph of a block holds."""
    return (8 * config.hidden_size + 8 * config.q_size + 12 * config.intermediate_size) * 4


def _backward(config: ModelConfig, recipe: Recipe) -> int:
    """Widest moment of a backward pass beside a block's weights: a piece's graph, or logits of both models."""
    assert recipe.corpus is not None
    piece, rows = max(recipe.corpus.sequence_length, TUNING_PIECE_TOKENS), head_rows(config)
    # A slice as stored, in float32, or laid out for the units; logits, and what is made of them; hidden states.
    head = rows * config.hidden_size * 8 + 3 * 2 * piece * rows * 4 + 6 * piece * config.hidden_size * 4
    return max(piece * _kept_by_autograd(config) + _packed(config, recipe, piece), head)


def _packed(config: ModelConfig, recipe: Recipe, tokens: int) -> int:
    """What the gradient of a weight is made of, a product over tokens, rounded and laid out for the units."""
    shapes = config.linear_shapes.values() if recipe.compute == BFLOAT16 else []
    return max((packed_bytes(tokens, m) + packed_bytes(tokens, n) for m, n in shapes), default=0)


def _learning(config: ModelConfig, recipe: Recipe) -> int:
    """What learned rounding of a block needs."""
    assert recipe.corpus is not None
    length, shapes = recipe.corpus.sequence_length, config.linear_shapes.values()
    weights, widest = sum(out * n for out, n in shapes), max(out * n for out, n in shapes)
    # Codes that it began with, keeps, has and will have, places and moments, the weights that products take; scales and
    # minima with what is known of each. Then gradients and a sample's graph, where before one weight was float32 too.
    kept = weights * (4 + 2 + 4) + weights * (2 if recipe.compute == BFLOAT16 else 4)
    kept += _OF_A_SCALE * 4 * (tuned_values(config, recipe) // config.num_layers)
    graph = length * _kept_by_autograd(config) + _packed(config, recipe, length)
    moving = (os.cpu_count() or 1) * _MOVED * 4 * SMALL_PIECE
    return kept + moving + max(4 * widest, 4 * weights + graph)


def _graphs(config: ModelConfig, recipe: Recipe, tuning: TuningRecipe) -> int:
    """All blocks' graphs for a batch, with their weights."""
    assert recipe.corpus is not None
    tokens = tuning.batch * recipe.corpus.sequence_length
    return config.num_layers * tokens * _kept_by_autograd(config) + 4 * config.linear_parameters


def _tuning(config: ModelConfig, recipe: Recipe, tuning: TuningRecipe, base: int) -> tuple[int, int]:
    """What tuning needs beside ``base`` (a block's weights and their gradients), and what may be in files instead."""
    assert recipe.corpus is not None
    codes = config.linear_parameters * 3 // 2  # a byte each while they are in use, beside half a byte as stored
    states = 3 * 4 * tuned_values(config, recipe) + (4 * config.linear_parameters if tuning.code_rate else 0)
    length = recipe.corpus.sequence_length
    block = (codes + states) // config.num_layers
    samples = recipe.corpus.samples * 2 + config.num_layers * tuning.batch
    stores = samples * length * config.hidden_size * 4
    return base + block + _backward(config, recipe), codes + states + stores + head_bytes(config)


def _limit(budget: int | None) -> int:
    if budget is not None:
        return budget
    available = available_bytes()
    return int((available if available is not None else 8 * 2**30) * _DEFAULT_SHARE) + rss_bytes()


def _check(limit: int, least: int, less: str | None = None) -> None:
    """Refuse a budget below ``least``; ``less`` is a flag with which less would do."""
    if limit < least:
        ways = [f"--ram-budget {-(-least // 2**20)}MiB or more", less, "a shorter --sequence-length"]
        raise TargetError(
            f"a RAM budget of {format_bytes(limit)} is too small; this run needs {format_bytes(least)}",
            f"give {', or '.join(way for way in ways if way)}",
        )
