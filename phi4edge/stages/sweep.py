"""Several runs at once: each a task that solves its whole run directory on one worker of a cluster.

A task goes on from what its run directory holds. So where its worker or machine is lost, Ray starts it again and at
most the block in work is done twice. Run directories lie on a file system that every machine sees.
"""

from __future__ import annotations

__all__ = ["Wanted", "solve_all"]

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from phi4edge.checkpoint.hub import resolve_model
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.memory import available_bytes, rss_bytes
from phi4edge.core.recipe import Recipe
from phi4edge.core.workdir import JOURNAL, Workdir
from phi4edge.stages.cluster import Cluster
from phi4edge.stages.job import prepare
from phi4edge.stages.quantize import QuantizeSummary, quantize

_FREE_SHARE = 0.6  # of a machine's free RAM that tasks without a budget plan with together
_LOOK_S = 2.0  # between two looks at the journals


@dataclass(frozen=True)
class Wanted:
    """One run."""

    recipe: Recipe
    out: Path


def solve_all(
    model: str,
    wanted: Sequence[Wanted],
    cluster: Cluster,
    shared: Path,
    *,
    restart: bool = False,
    ram_budget: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[QuantizeSummary]:
    """Solve every run, as :func:`phi4edge.stages.quantize.quantize` does; summaries in order, each when it is there.

    ``shared`` is a folder that run directories are in; the workers must see it, and the model, at the same paths.
    ``ram_budget`` is each task's own; without one, tasks beside each other on a machine share what is free there.

    Raises:
        InputError: a worker does not see them.
        Phi4EdgeError: as quantize says; finished work is kept, and the other tasks end with the connection.
    """
    checkpoint, decided = open_checkpoint(model), []
    for run in wanted:  # what can be refused is refused here; and what hangs on the machine is decided once
        job = prepare(checkpoint, run.recipe, ram_budget, "cpu")
        cluster.check_job("cpu", job.recipe.compute)
        decided.append(replace(run.recipe, compute=job.recipe.compute))
    shared.mkdir(parents=True, exist_ok=True)
    cluster.check_shared(shared, resolve_model(model))
    if restart:  # once, and here: a task that Ray starts again goes on
        for run in wanted:
            Workdir.clear(run.out)
    share = min(len(wanted), max(cluster.at_a_time(torch.get_num_threads()).values()))
    started = [
        cluster.start(_solved, Path.cwd(), model, recipe, run.out, ram_budget, share, place=i)
        for i, (run, recipe) in enumerate(zip(wanted, decided, strict=True))
    ]
    seen = sum(_committed(run.out) for run in wanted)
    progress.start("quantize", checkpoint.config.num_layers * len(wanted), "block", seen)
    for run, reference in zip(wanted, started, strict=True):
        while not cluster.finished([reference], _LOOK_S):
            done = sum(_committed(each.out) for each in wanted)
            progress.advance(max(done - seen, 0))
            seen = max(done, seen)
        summary = cluster.get(reference)
        progress.note(f"{run.out.name} is solved")
        yield summary
    progress.finish()


def _solved(folder: Path, model: str, recipe: Recipe, out: Path, ram_budget: int | None, share: int) -> QuantizeSummary:
    os.chdir(folder)  # relative paths of model, corpus and run are the driver's
    free = available_bytes()
    if ram_budget is None and share > 1 and free is not None:
        ram_budget = int(free * _FREE_SHARE / share) + rss_bytes()
    return quantize(model, recipe, out, ram_budget=ram_budget)


def _committed(run: Path) -> int:
    """Blocks in the journal."""
    try:
        return (run / JOURNAL).read_bytes().count(b"\n")
    except OSError:
        return 0
