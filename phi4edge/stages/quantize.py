"""Quantize: block by block, each of the four linears solved on what the quantized model feeds it.

For every block: load its weights; for each linear gather H over the calibration samples (but for those kept
aside), solve, compare with rounding to nearest on the samples kept aside, and send everything on through the
weights that were chosen. A block is committed with its codes and the residual stream after it; a process that
starts again goes on from there, and gives the same bytes.
"""

from __future__ import annotations

__all__ = ["QuantizeSummary", "plan", "quantize"]

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from phi4edge.calibration.blockpass import BlockPass
from phi4edge.calibration.budget import SOLVER_ROWS
from phi4edge.calibration.statistics import InputMoments, LayerStats
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.atomic import write_bytes
from phi4edge.core.events import SILENT, Event, Progress
from phi4edge.core.hashing import sha256_file, sha256_json
from phi4edge.core.memory import format_bytes, peak_rss_bytes, release_memory, rss_bytes
from phi4edge.core.recipe import Recipe
from phi4edge.core.registry import load as load_plugin
from phi4edge.core.workdir import Workdir
from phi4edge.model.block import LINEARS, Block, load_block
from phi4edge.quant.linear import QuantizedLinear
from phi4edge.quant.scheme import parse_scheme
from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers._refine import refine
from phi4edge.solvers._targets import shifted_target
from phi4edge.stages.allocate import allocate
from phi4edge.stages.guard import held_out_errors
from phi4edge.stages.inputs import hash_checkpoint, note_location, open_inputs
from phi4edge.stages.job import Job, prepare
from phi4edge.stages.manifest import finish
from phi4edge.stages.run_reader import MANIFEST, PERFORMANCE, block_file, read_json, read_manifest
from phi4edge.stages.scaling import scale_inputs
from phi4edge.stages.stream import CalibrationStream, side_by_side
from phi4edge.stages.tune import tune


@dataclass(frozen=True)
class QuantizeSummary:
    """A finished run: its manifest, which is the same for every process that ends it, and what it cost."""

    path: Path
    manifest: dict[str, Any]
    performance: dict[str, Any]


def quantize(
    model: str | Path,
    recipe: Recipe,
    out: Path,
    *,
    restart: bool = False,
    ram_budget: int | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> QuantizeSummary:
    """Solve every linear of ``model`` as ``recipe`` says, into run directory ``out``.

    Raises:
        InputError: the model or the corpus is not usable; nothing is written then.
        TargetError: ``ram_budget`` cannot be kept.
        ResumeError: ``out`` was begun with other inputs.
    """
    checkpoint = open_checkpoint(model)
    job = prepare(checkpoint, recipe, ram_budget, device, out, progress)
    hashes = hash_checkpoint(checkpoint.index, out)
    shared = open_inputs(recipe.corpus, job.corpus.sha256 if job.corpus else None, hashes)
    inputs = {"kind": "quantize", "recipe": recipe.as_dict(), **shared}
    with Workdir.open(out, inputs, restart=restart) as work:
        note_location(checkpoint.index, out, hashes)
        manifest = _finished(work, checkpoint.config.num_layers)
        if manifest is None:
            key = sha256_json(inputs)
            mix = None
            if recipe.mix is not None:
                with torch.no_grad():
                    mix = allocate(job, work.path, key, progress)
                types = {name: parse_scheme(other) for name, other in mix.types.items() if other != mix.base}
                job = replace(job, scheme=parse_scheme(mix.base), types=types)
            with torch.inference_mode():
                _solve_blocks(job, work, progress)
            with torch.no_grad():
                tuned = tune(job, work.path, key, progress) if recipe.tuning is not None else None
            manifest = finish(job, work, key, tuned, mix)
        return QuantizeSummary(out, manifest, read_json(out / PERFORMANCE))


def plan(model: str | Path, recipe: Recipe, *, ram_budget: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """The same checks as :func:`quantize`, and what it would do; writes nothing and reads no weight."""
    job = prepare(open_checkpoint(model), recipe, ram_budget, device)
    config = job.checkpoint.config
    return {
        "model": job.checkpoint.index.name,
        "recipe": recipe.as_dict(),
        "blocks": config.num_layers,
        "linears": config.num_layers * len(LINEARS),
        "codes_bytes": int(config.linear_parameters * job.scheme.bits_per_weight / 8),
        "memory": asdict(job.memory),
    }


def _solve_blocks(job: Job, work: Workdir, progress: Progress) -> None:
    config = job.checkpoint.config
    done = _check_committed(work)
    progress.start("quantize", config.num_layers * len(LINEARS), "linear", done * len(LINEARS))
    if work.repaired:
        progress.note(work.repaired)
    stream = CalibrationStream(job, work, done, progress) if job.corpus is not None else None
    for layer in range(done, config.num_layers):
        started = time.monotonic()
        block = load_block(job.source, layer)
        solved, records, events = _solve_block(job, block, layer, stream, progress)
        files = [block_file(layer)]
        write_bytes(work.path / files[0], save({k: v for tensors in solved for k, v in tensors.items()}))
        record: dict[str, Any] = {"block": layer, "linears": records, "events": [e.as_dict() for e in events]}
        if stream is not None and layer + 1 < config.num_layers:
            record |= stream.save(layer + 1)
        record["performance"] = {"seconds": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()}
        work.commit(record, files)
        if stream is not None:
            stream.forget(layer)
        del block, solved
        release_memory()  # so that what a block leaves behind does not add up
    progress.finish()


def _solve_block(
    job: Job, block: Block, layer: int, stream: CalibrationStream | None, progress: Progress
) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]], list[Event]]:
    """Tensors to store, one record a linear, and events of one block."""
    tensors: list[dict[str, Tensor]] = []
    records: list[dict[str, Any]] = []
    events: list[Event] = []
    passing = stream.block_pass(block) if stream is not None else None
    arriving = passing.inputs(0) if passing is not None else None
    exact = stream.exact_pass(block) if stream is not None else None
    beside = exact.inputs(0) if exact is not None else None
    solver = load_plugin("phi4edge.solvers", job.recipe.method)
    needs_hessian = bool(solver.NEEDS_HESSIAN) or job.recipe.whole_hessian or job.recipe.scales_inputs
    linear: QuantizedLinear | None = None
    for stage, (name, weight) in enumerate(zip(LINEARS, (block.qkv, block.o, block.gate_up, block.down), strict=True)):
        full = f"model.layers.{layer}.{name}"
        progress.status(f"block {layer} {name} · RSS {format_bytes(rss_bytes())}")
        stats = None
        if arriving is not None and stream is not None:
            moments = InputMoments(weight.shape[1], full=needs_hessian, exact=exact is not None, device=job.device)
            for sample, x, full_x in side_by_side(arriving, beside):
                if sample < stream.kept:
                    moments.add(x, full_x)
            stats = moments.result(job.recipe.sink_share, job.recipe.shrinkage)
        given, factors = weight.to(job.device), None
        if job.recipe.scales_inputs and stats is not None and passing is not None:
            scaled = scale_inputs(job, layer, stage, given, stats, passing, linear)
            given, stats, passing, factors = scaled.weight, scaled.stats, scaled.passing, scaled.factors
            tensors.append(scaled.tensors)
        linear, record, found = _solve_linear(job, full, given, stats, passing, exact, factors, stage, stream)
        tensors.append(linear.to("cpu").to_tensors())
        if stats is not None:
            tensors.append({f"{full}.imatrix": stats.mean_square.cpu()})
        records.append(record if factors is None else record | {"awq": scaled.record})
        events += found
        if passing is not None:
            arriving = passing.advance(stage, linear.dequantize())
            beside = exact.advance(stage, weight) if exact is not None else None
        progress.advance()
    if arriving is not None:
        for _ in side_by_side(arriving, beside):  # the block's outputs, written to the streams as they come
            pass
    return tensors, records, events


def _solve_linear(
    job: Job,
    name: str,
    weight: Tensor,
    stats: LayerStats | None,
    passing: BlockPass | None,
    exact: BlockPass | None,
    factors: Tensor | None,
    stage: int,
    stream: CalibrationStream | None,
) -> tuple[QuantizedLinear, dict[str, Any], list[Event]]:
    recipe = job.recipe
    options = SolverOptions(
        recipe.damp_percent, recipe.act_order, SOLVER_ROWS, recipe.refit, recipe.sweeps, recipe.group_aware
    )
    problem = Problem(
        name, weight, stats.hessian if stats else None, job.scheme_of(name), stats.mean_square if stats else None
    )
    aimed = problem
    shift_events: tuple[Event, ...] = ()
    if stats is not None and stats.hessian is not None and stats.shift is not None:
        target, shift_events = shifted_target(
            weight, stats.hessian, stats.shift, recipe.full_precision_targets, recipe.damp_percent, name
        )
        aimed = replace(problem, weight=target)
    solver = load_plugin("phi4edge.solvers", recipe.method)
    solution: Solution = solver.solve(aimed, options)
    solution = refine(aimed, solution, options)
    record: dict[str, Any] = {
        "name": name,
        "method": recipe.method,
        "loss": solution.loss,
        "damp_percent": solution.damp_percent,
        "tokens": stats.tokens if stats else 0,
    }
    if solution.loss_unrefined is not None:
        record["loss_unrefined"] = solution.loss_unrefined
    if aimed is not problem:
        record["target_shift"] = float((aimed.weight - weight).norm() / weight.norm().clamp_min(1e-30))
    events = [*shift_events, *solution.events]
    plain = not solver.NEEDS_HESSIAN and not recipe.whole_hessian
    if plain or passing is None or stream is None or not recipe.guard:
        return solution.linear, record, events
    rtn: Solution = load_plugin("phi4edge.solvers", "rtn").solve(problem, options)
    beside = exact.inputs(stage, stream.kept) if exact is not None else None
    if beside is not None and factors is not None:
        beside = ((sample, x / factors) for sample, x in beside)
    held = side_by_side(passing.inputs(stage, stream.kept), beside)
    ours, theirs = held_out_errors(held, weight, [solution.linear.dequantize(), rtn.linear.dequantize()])
    record |= {"loss_rtn": rtn.loss, "heldout_error": asdict(ours), "heldout_error_rtn": asdict(theirs)}
    if not ours.loses_to(theirs):
        return solution.linear, record, events
    where = "first positions" if ours.first > theirs.first else "positions after the first"
    who = f"rtn and {'refinement' if recipe.refined else 'shift'}" if recipe.method == "rtn" else recipe.method
    detail = f"{who} loses to rtn on held-out {where}; rtn's weights are taken"
    values = {"first": ours.first, "first_rtn": theirs.first, "rest": ours.rest, "rest_rtn": theirs.rest}
    events.append(Event("fallback_to_rtn", name, detail, {k: float(v) for k, v in values.items()}))
    return rtn.linear, record | {"method": "rtn"}, events


def _check_committed(work: Workdir) -> int:
    """Number of leading blocks whose files are as the journal says; the rest is done again."""
    for count, record in enumerate(work.records):
        for name, digest in record["files"].items():
            path = work.path / name
            if not path.is_file() or sha256_file(path) != digest:
                work.drop_after(count, f"{name} is missing or damaged; block {count} and later ones are done again")
                return count
    return len(work.records)


def _finished(work: Workdir, blocks: int) -> dict[str, Any] | None:
    """The manifest of a run that is whole; one that is not loses its manifest and is gone on with."""
    if (work.path / MANIFEST).is_file() and _check_committed(work) == blocks:
        manifest = read_manifest(work.path)
        files = manifest["data"]["files"].items()
        if all((work.path / name).is_file() and sha256_file(work.path / name) == digest for name, digest in files):
            return manifest
    (work.path / MANIFEST).unlink(missing_ok=True)
    return None
