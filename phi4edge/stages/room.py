"""Room on disk that a run takes, counted from the shapes before the first weight is read.

    RUN/blocks/        codes and parameters, for good; 4-bit codes two to a byte, others a byte each
    RUN/imatrix…       mean squared inputs, in the blocks and once more together
    RUN/hidden/        the residual stream after the last blocks, float32; beside it, where the RAM budget asks for
                       it, what samples are between two linears
    RUN/curvature/     F of two linears a block, until the run is whole; while it is measured, what goes into each block
    RUN/sensitivity/   the same scratch, where types are chosen
    RUN/tuning/        teacher, optimizer states, and what lies between blocks

Weights are never written a second time in full precision.
"""

from __future__ import annotations

__all__ = ["check_room", "run_bytes"]

from collections.abc import Callable
from pathlib import Path

from phi4edge.calibration.budget import MemoryPlan, head_bytes, tuned_values
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.disk import require_space
from phi4edge.core.recipe import Recipe
from phi4edge.quant.scheme import Scheme
from phi4edge.stages.run_reader import MANIFEST

_KEPT_STREAMS = 3  # before a block, after it, and the one before that until the block is committed
_STATES = 3  # tuning: the last committed step's, the best one's, and what the step in work has moved
_SMALL = 1 << 20  # journal, manifest, headers


def check_room(
    run: Path, config: ModelConfig, recipe: Recipe, memory: MemoryPlan, scheme_of: Callable[[str], Scheme]
) -> None:
    """Refuse to begin, or to go on with, a run that has no room at ``run``.

    Raises:
        TargetError: with what is still needed, and what is free.
    """
    if (run / MANIFEST).is_file():  # whole: at most it is looked at
        return
    there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) if run.is_dir() else 0
    needed = run_bytes(config, recipe, memory, scheme_of)
    require_space(run, max(0, needed - there), "this run", "free space, or choose another --out")


def run_bytes(config: ModelConfig, recipe: Recipe, memory: MemoryPlan, scheme_of: Callable[[str], Scheme]) -> int:
    """Most bytes that the run directory takes at any moment."""
    kept = _SMALL + sum(_linear_bytes(scheme_of(name), shape) for name, shape in config.linears.items())
    corpus = recipe.corpus
    if corpus is not None or recipe.imatrix_sha256 is not None:
        kept += 2 * 4 * sum(columns for _, columns in config.linears.values())
    if corpus is None:
        return kept
    stream = corpus.tokens * config.hidden_size * 4  # one residual stream
    streams = 2 if recipe.full_precision_targets else 1
    solving = _KEPT_STREAMS * streams * stream
    if memory.spill:
        widths = config.hidden_size + config.q_size + config.intermediate_size
        solving += streams * corpus.tokens * widths * 4 + (2 * stream if recipe.rounding is not None else 0)
    tuning = _tuning_bytes(config, recipe, memory, stream) if recipe.tuning is not None else 0
    measured_on = 0  # samples that go back through all blocks, which keep what goes into each
    if recipe.mix is not None:
        measured_on = min(recipe.mix.samples, recipe.kept)
    if recipe.output_curvature:
        kept += config.num_layers * 2 * config.hidden_size**2 * 4
        measured_on = max(measured_on, min(recipe.curvature_samples, recipe.kept))
    before = (config.num_layers + 4) * stream * measured_on // corpus.samples
    if measured_on:
        before += head_bytes(config)
    return max(kept + max(solving, tuning), before)


def _linear_bytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    rows, columns = shape
    codes = rows * columns // (2 if scheme.bits == 4 else 1)
    groups = rows * scheme.groups(columns)
    shared = rows * max(1, columns // scheme.unit) if scheme.unit > 0 else rows
    if scheme.nested:
        return codes + groups * (1 if scheme.symmetric else 2) + shared * (2 if scheme.symmetric else 4)
    second = 0 if scheme.symmetric else 1 if scheme.grid == "affine" else 2
    return codes + groups * (2 + second)


def _tuning_bytes(config: ModelConfig, recipe: Recipe, memory: MemoryPlan, stream: int) -> int:
    assert recipe.tuning is not None
    assert recipe.corpus is not None
    values = tuned_values(config, recipe)
    states = _STATES * 3 * 4 * values
    result = 2 * values
    if recipe.tuning.code_rate:
        states += _STATES * 4 * config.linear_parameters
        result += config.linear_parameters
    between = config.num_layers * recipe.tuning.batch * recipe.corpus.sequence_length * config.hidden_size * 4
    scratch = 2 * stream + between + head_bytes(config) if memory.spill_tuning else 0
    return stream + states + result + scratch
