"""Quantize: choose types if a mix was asked for, solve block by block, tune, and write the manifest.

A block is committed with its codes and the residual stream after it; a process that starts again goes on from there,
and gives the same bytes.
"""

from __future__ import annotations

__all__ = ["QuantizeSummary", "finished_manifest", "intact_blocks", "plan", "quantize"]

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.checkpoint.rows_ahead import RowsAhead
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_file, sha256_json
from phi4edge.core.memory import format_bytes, peak_rss_bytes, release_memory
from phi4edge.core.parts import PartTimes
from phi4edge.core.recipe import Recipe
from phi4edge.core.workdir import RUN_FILE, Workdir
from phi4edge.model.block import LINEARS
from phi4edge.model.compute import computing
from phi4edge.quant.parallel import run_parallel
from phi4edge.quant.scheme import parse_scheme
from phi4edge.stages.allocate import allocate, check_budget
from phi4edge.stages.block_solver import BlockSolver, rows_in_order
from phi4edge.stages.block_writer import write_block
from phi4edge.stages.cluster import Cluster
from phi4edge.stages.curvature import Curvatures, measure_curvature
from phi4edge.stages.hash_behind import HashBehind, is_unsettled, unsettled
from phi4edge.stages.inputs import check_unchanged, hash_checkpoint, known_hashes, note_location, open_inputs
from phi4edge.stages.job import Job, prepare
from phi4edge.stages.manifest import finish
from phi4edge.stages.pace import Pace, PacedProgress
from phi4edge.stages.rates import estimate
from phi4edge.stages.ray_samples import stored_bytes
from phi4edge.stages.run_reader import MANIFEST, PERFORMANCE, block_file, read_json, read_manifest
from phi4edge.stages.stream import CalibrationStream
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
    imatrix: Path | None = None,
    cluster: Cluster | None = None,
) -> QuantizeSummary:
    """Solve every linear of ``model`` as ``recipe`` says, into run directory ``out``.

    ``imatrix`` is the file whose hash the recipe names. ``cluster`` takes samples through the blocks and solves pieces
    of linears; the codes are those of this process alone.

    Raises:
        InputError: the model or the corpus is not usable; nothing is written then, but for blocks that were finished
            without data before a damaged weight was met.
        TargetError: ``ram_budget`` cannot be kept.
        ResumeError: ``out`` was begun with other inputs.
    """
    checkpoint = open_checkpoint(model)
    if recipe.mix is not None:
        check_budget(checkpoint.config, recipe.mix)
    job = prepare(checkpoint, recipe, ram_budget, device, out, progress, imatrix, spread=cluster is not None)
    if cluster is not None:
        cluster.check_job(device, job.recipe.compute)
        _note_small_stores(job, cluster, progress)
    index, corpus_sha256 = checkpoint.index, job.corpus.sha256 if job.corpus else None

    def inputs(hashes: dict[str, str]) -> dict[str, Any]:
        return {"kind": "quantize", "recipe": job.recipe.as_dict(), **open_inputs(recipe.corpus, corpus_sha256, hashes)}

    hashes = None if _hashed_behind(job, out, restart=restart) else hash_checkpoint(index, out)
    begun = unsettled(inputs({}), index) if hashes is None else inputs(hashes)
    with Workdir.open(out, begun, restart=restart) as work:
        if hashes is not None:
            note_location(index, out, hashes)

        def settle(found: dict[str, str]) -> None:
            check_unchanged(index, begun["checkpoint_stamps"])
            note_location(index, out, found)
            work.settle(inputs(found))

        manifest = finished_manifest(work, checkpoint.config.num_layers)
        if manifest is None:
            manifest = _work_off(job, work, inputs, progress, cluster, settle if hashes is None else None)
        return QuantizeSummary(out, manifest, read_json(out / PERFORMANCE))


def _hashed_behind(job: Job, out: Path, *, restart: bool) -> bool:
    """Whether the checkpoint's hashes are known only in the course of the run: nothing before its end hangs on them."""
    if not restart and is_unsettled(out):
        return True
    begun = (out / RUN_FILE).is_file() and not restart
    fast = job.by_rows and job.recipe.mix is None
    return fast and not begun and known_hashes(job.checkpoint.index, out) is None


def _work_off(
    job: Job,
    work: Workdir,
    inputs: Callable[[dict[str, str]], dict[str, Any]],
    progress: Progress,
    cluster: Cluster | None,
    settle: Callable[[dict[str, str]], None] | None,
) -> dict[str, Any]:
    """Everything that is not done yet; the manifest.

    ``inputs`` makes the run's of the checkpoint's hashes; ``settle`` is told these where they are not known yet.
    """
    recipe, index = job.recipe, job.checkpoint.index
    mix, curvatures, measured = None, None, None
    if recipe.mix is not None or recipe.output_curvature:
        assert settle is None, "they are kept by what the run was begun with"
        key = sha256_json(inputs(hash_checkpoint(index, work.path)))
        with torch.no_grad(), computing(recipe.compute):
            if recipe.mix is not None:
                mix = allocate(job, work.path, key, progress)
                types = {name: parse_scheme(other) for name, other in mix.types.items() if other != mix.base}
                job = replace(job, scheme=parse_scheme(mix.base), types=types)
            if recipe.output_curvature:
                curvatures, measured = measure_curvature(job, work.path, key, progress)
    done = intact_blocks(work)
    with ExitStack() as opened:
        behind = None
        if settle is not None:
            wanted = rows_in_order(job, done) if job.by_rows else []
            behind = opened.enter_context(HashBehind(index, work.path, wanted, settle))
        with torch.inference_mode():
            _solve_blocks(job, work, done, progress, curvatures, cluster, behind)
        if behind is not None:
            progress.status("hashing the checkpoint")
            behind.wait()
    key = sha256_json(inputs(hash_checkpoint(index, work.path)))
    with torch.no_grad(), computing(recipe.compute):
        tuned = tune(job, work.path, key, progress) if recipe.tuning is not None else None
    return finish(job, work, key, tuned, mix, measured)


def plan(
    model: str | Path,
    recipe: Recipe,
    *,
    ram_budget: int | None = None,
    device: str = "cpu",
    imatrix: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """The same checks as :func:`quantize`, what it would do, and how long that would take (estimated).

    For the estimate a few weights are read, and ``out``'s disk is written to; nothing is left there.
    """
    began = time.perf_counter()
    job = prepare(open_checkpoint(model), recipe, ram_budget, device, imatrix=imatrix)
    preparing = time.perf_counter() - began
    if recipe.mix is not None:
        check_budget(job.checkpoint.config, recipe.mix)
    config = job.checkpoint.config
    return {
        "model": job.checkpoint.index.name,
        "recipe": job.recipe.as_dict(),
        "blocks": config.num_layers,
        "linears": config.num_layers * len(LINEARS),
        "codes_bytes": int(config.linear_parameters * job.scheme.bits_per_weight / 8),
        "memory": asdict(job.memory),
        "time": None if device != "cpu" else estimate(job, out or Path(), preparing).as_dict(),
    }


def _note_small_stores(job: Job, cluster: Cluster, progress: Progress) -> None:
    if job.corpus is None:
        return
    streams = 2 if job.recipe.full_precision_targets > 0 else 1
    needed = stored_bytes(job.checkpoint.config, job.corpus.tokens.numel(), streams)
    if needed > cluster.store_bytes:
        progress.note(
            f"the workers' object stores hold {format_bytes(cluster.store_bytes)}, this run's samples come to "
            f"{format_bytes(needed)}: Ray will write the rest to disk and read it again "
            "(more workers, or ray start --object-store-memory)"
        )


def _solve_blocks(
    job: Job,
    work: Workdir,
    done: int,
    progress: Progress,
    curvatures: Curvatures | None,
    cluster: Cluster | None,
    hashing: HashBehind | None,
) -> None:
    config = job.checkpoint.config
    progress = _paced(job, work, done, progress)
    progress.start("quantize", config.num_layers * len(LINEARS), "linear", done * len(LINEARS))
    if work.repaired:
        progress.note(work.repaired)
    parts = PartTimes()
    stream = CalibrationStream(job, work, done, progress, parts, cluster) if job.corpus is not None else None
    run = cluster.run_rows if cluster is not None else run_parallel
    with ThreadPoolExecutor(1, "commit") as behind, ExitStack() as open_rows:
        rows = None
        if job.by_rows:
            wanted, digest = rows_in_order(job, done), None if hashing is None else hashing.digest
            rows = open_rows.enter_context(RowsAhead(job.checkpoint, wanted, torch.get_num_threads(), digest))
        solver = BlockSolver(job, stream, progress, parts, curvatures, run, rows)
        pending: Future[None] | None = None
        for layer in range(done, config.num_layers):
            started = time.monotonic()
            if hashing is not None:
                hashing.reached()
            solved = solver.solve(layer, pending)
            if cluster is not None and layer == done:
                solved.events[:0] = cluster.events
            events = [event.as_dict() for event in solved.events]
            record: dict[str, Any] = {"block": layer, "linears": solved.records, "events": events}
            if solved.rounding is not None:
                record["rounding"] = solved.rounding
            seconds = time.monotonic() - started
            taken = parts.take()
            record["performance"] = {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes(), "parts": taken}
            ends = layer + 1 == config.num_layers
            pending = behind.submit(_commit, work, layer, solved.tensors, record, stream, ends=ends)
            del solved
            release_memory()  # so that what a block leaves behind does not add up
            progress.block_done(taken.get("forward", 0.0))
        if pending is not None:
            pending.result()
    progress.finish()


def _commit(
    work: Workdir,
    layer: int,
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    stream: CalibrationStream | None,
    *,
    ends: bool,
) -> None:
    """Write a block, the samples before the one after it (``ends``: there is none) and the journal's line.

    The next block is in work meanwhile; it does not change its samples before this is done.
    """
    name = block_file(layer)
    written = write_block(work.path / name, tensors)
    kept = stream.save(layer + 1) if stream is not None and not ends else {}
    work.commit(record | kept, {name: written})
    if stream is not None:
        stream.forget(layer)


def _paced(job: Job, work: Workdir, done: int, shown: Progress) -> PacedProgress:
    """A display that knows what is left: from what the finished blocks took, or a prediction while there are none."""
    blocks = job.checkpoint.config.num_layers
    costs = [record["performance"] for record in work.records[:done]]
    finished = [float(cost["seconds"]) for cost in costs]
    forward = [float(cost["parts"]["forward"]) for cost in costs if cost["parts"].get("forward")]
    # Blocks that are done say enough of the others, not of tuning, which itself counts its steps.
    worth = done < blocks and (not finished or job.recipe.tuning is not None)
    prediction = estimate(job, work.path) if shown.estimates and worth and job.device == "cpu" else None
    return PacedProgress(shown, Pace(blocks, finished, prediction, forward=forward))


def intact_blocks(work: Workdir) -> int:
    """Number of leading blocks whose files are as the journal says; the rest is done again."""
    for count, record in enumerate(work.records):
        for name, digest in record["files"].items():
            path = work.path / name
            if not path.is_file() or sha256_file(path) != digest:
                work.drop_after(count, f"{name} is missing or damaged; block {count} and later ones are done again")
                return count
    return len(work.records)


def finished_manifest(work: Workdir, blocks: int) -> dict[str, Any] | None:
    """The manifest of a run that is whole; one that is not loses its manifest and is gone on with."""
    if (work.path / MANIFEST).is_file() and intact_blocks(work) == blocks:
        manifest = read_manifest(work.path)
        files = manifest["data"]["files"].items()
        if all((work.path / name).is_file() and sha256_file(work.path / name) == digest for name, digest in files):
            return manifest
    (work.path / MANIFEST).unlink(missing_ok=True)
    return None
