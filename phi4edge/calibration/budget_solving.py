"""What solving a block needs in RAM, moment by moment, from the shapes alone.

One linear [m, n] is in RAM at a time. Beside it stand, one after the other: what it is read from; H and a shard's part
of it with what is gathered for targets; H and its factor with the shifted weight and the rows in work; candidates'
errors for the guard; and a sample on its way through. Throughout there are the codes of the block in work and of the
one being written.
"""

from __future__ import annotations

__all__ = ["solving_bytes"]

import os

from phi4edge.calibration.blockpass import COMPUTED_TOKENS, EMBEDDED_VALUES, samples_together
from phi4edge.calibration.judging import CHECKED_WEIGHTS, judged_rows
from phi4edge.calibration.statistics import SHARD, summed_values, takes_product
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.rows_ahead import READ_AHEAD
from phi4edge.core.recipe import BFLOAT16, Recipe
from phi4edge.model.crossed import packed_bytes, upper_rows
from phi4edge.model.forward import EMBEDDED_ROWS
from phi4edge.quant.parallel import read_pieces, row_pieces
from phi4edge.quant.scheme import parse_scheme

_SHIFT_ROWS = 2048  # at a time, by targets
_IN_WORK = 13  # bytes a weight that the solver works on: original, errors, codes, and what is searched
_ROUNDED_WEIGHTS, _ROUNDED = 2**18, 64  # rounded at a time, as they are read; bytes that each of them takes
_STORED = 4  # bytes a weight in the checkpoint, at most
_BESIDE = 5 << 22  # bytes in which the checkpoint is hashed, and a block written
_DEQUANTIZED = 5  # bytes a weight of codes and their values


def solving_bytes(config: ModelConfig, recipe: Recipe, *, by_rows: bool = False) -> int:
    """Peak of everything beside the interpreter, activations between blocks not counted.

    ``by_rows``: weights are rounded as their rows are read.
    """
    shapes = list(config.linear_shapes.values())
    bits = max(
        [parse_scheme(recipe.scheme).bits_per_weight, *(parse_scheme(t).bits_per_weight for _, t in recipe.types)]
    )
    if recipe.mix is not None:
        bits = max(parse_scheme(name).bits_per_weight for name in recipe.mix.candidates)
    codes = int(sum(m * n for m, n in shapes) * max(bits, 4.5) / 8)
    held = 2 * codes  # of the block in work, and of the one before as it is written
    if by_rows:
        largest = max(m * n for m, n in shapes)
        working = (os.cpu_count() or 1) * min(_ROUNDED_WEIGHTS, largest) * _ROUNDED
        piece = max(int(read_pieces(m, n)[0].stop) * n for m, n in shapes)
        read = ((os.cpu_count() or 1) + READ_AHEAD) * piece * _STORED
        return held + working + read + _BESIDE
    peak: int = max(_linear_bytes(config, recipe, m, n) for m, n in shapes)
    if recipe.corpus is not None:
        slices = EMBEDDED_ROWS * config.hidden_size * 6
        filling = 4 * min(EMBEDDED_VALUES, recipe.corpus.tokens * config.hidden_size)
        peak = max(peak, slices + filling)
    return held + peak


def _linear_bytes(config: ModelConfig, recipe: Recipe, m: int, n: int) -> int:
    W = 4 * m * n
    # The tensor as stored beside its float32 form; rotated, beside two more.
    reading = m * n * (6 if recipe.rotation == "none" else 14)
    pieces = row_pieces(m, n)
    rows = min(os.cpu_count() or 1, len(pieces)) * int(pieces[0].stop)
    checked = min(m * n, CHECKED_WEIGHTS)
    working = max(rows * n * _IN_WORK + m * n, m * n * 2 + checked * (4 + _DEQUANTIZED))  # searching, and the loss
    if recipe.corpus is None:
        return max(reading, W + working)
    length = recipe.corpus.sequence_length
    computed = samples_together(length, COMPUTED_TOKENS) * length
    two = recipe.full_precision_targets > 0
    whole = recipe.method != "rtn" or recipe.whole_hessian or recipe.scales_inputs
    square = 4 * n * n if whole else 0
    shift = (W if takes_product(m, n) else square) if two else 0
    parts = 2 if recipe.corpus.samples - recipe.held_out > SHARD else 1
    # Inputs without the first positions beside those with; so of the other stream, their difference, its product.
    arriving = 4 * length * ((6 if two else 3) * n + (2 * m if takes_product(m, n) else 0))
    if recipe.compute == BFLOAT16:  # both factors as the units take them, and the weight for the product
        arriving += packed_bytes(length, n) * (2 if two else 1)
        arriving += packed_bytes(length, m) + 2 * m * n if two and takes_product(m, n) else 0
    sums = 4 * summed_values(n) if whole else 0
    gathering = W + parts * (sums + shift) + arriving
    filling = 4 * upper_rows(n)[0].stop * n if whole else 0
    gathered = W + square + filling + shift  # H, and the block of sums that it is being filled with
    # H and its factor, or H as the search for scales multiplies with it; the factor alone where H is used up.
    ordered = recipe.act_order or recipe.group_aware
    factors = square if recipe.hessian_used_up and not (ordered or recipe.scales_inputs) else 2 * square
    targets = shift + W if two else 0
    shifting = 3 * 4 * min(max(m, n), _SHIFT_ROWS) * n  # dividing by H
    if two and not takes_product(m, n) and recipe.compute == BFLOAT16:  # what is left of D, and rows, for the units
        shifting = max(shifting, 2 * n * (2 * n + (os.cpu_count() or 1) * min(m, _SHIFT_ROWS)))
    solving = W + factors + targets + max(working, shifting)
    if recipe.output_curvature:  # F and its factor; targets and errors of such a linear's rows
        solving += 2 * 4 * m * m + 2 * W
    halves = 2 if recipe.compute == BFLOAT16 else 0  # bytes a weight, rounded for the units
    judged = len(judged_rows(m)) * n
    compared = min(judged, CHECKED_WEIGHTS)
    errors = compared * (2 * 4 + _DEQUANTIZED + 3 * halves)  # of both candidates
    tried = 2 * m * n + judged  # codes: for the shifted target, for the plain one, rounded to nearest
    again = factors if two or recipe.output_curvature or not recipe.hessian_used_up else 0  # to solve it once more
    checking = W + again + targets + tried + errors + 4 * computed * (3 * n + 6 * compared // n)
    # The weight itself is gone by then, or stands in the place of codes and their values; rounded, these go as well.
    sent = m * n * (1 + (halves or 4) if recipe.full_precision_targets == 0 else _DEQUANTIZED + halves)
    passing = max(m * n * (_DEQUANTIZED + halves), sent + 4 * computed * (2 * n + 3 * m + 3 * config.q_size))
    return max(reading, gathering, gathered, solving, checking, passing)
