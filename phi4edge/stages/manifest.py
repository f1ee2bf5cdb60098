"""What makes a run complete: its imatrix, what it cost, and last of all its manifest.

The manifest is the same for every process that ends the run, however often it was interrupted; what differs from one
to the next (seconds, RSS) stands in ``performance.json``.
"""

from __future__ import annotations

__all__ = ["finish"]

from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from phi4edge.core.atomic import write_bytes, write_json
from phi4edge.core.events import Event
from phi4edge.core.registry import load as load_plugin
from phi4edge.core.workdir import Workdir
from phi4edge.stages.allocate import Allocation
from phi4edge.stages.curvature import forget_curvature
from phi4edge.stages.job import Job
from phi4edge.stages.run_reader import IMATRIX, MANIFEST, PERFORMANCE, block_file
from phi4edge.stages.tuning_account import Tuned
from phi4edge.stages.tuning_state import total_cost


def finish(
    job: Job,
    work: Workdir,
    key: str,
    tuned: Tuned | None,
    mix: Allocation | None,
    measured: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write the imatrix and, last of all, the manifest that makes the run complete."""
    config = job.checkpoint.config
    if job.corpus is not None or job.imatrix is not None:
        imatrix: dict[str, Tensor] = {}
        for layer in range(config.num_layers):
            with safe_open(work.path / block_file(layer), "pt") as file:
                imatrix |= {k: file.get_tensor(k) for k in file.keys() if k.endswith(".imatrix")}  # noqa: SIM118
        write_bytes(work.path / IMATRIX, save(imatrix))
    for leftover in (work.path / "hidden").glob("*.bin"):
        leftover.unlink()
    c = job.recipe.corpus
    events = [event for record in work.records for event in record["events"]]
    events = [e.as_dict() for e in _length_events(job)] + events
    if tuned is not None:
        events += [e.as_dict() for e in tuned.events]
    manifest = {
        "schema": "phi4edge/quantize/1",
        "ok": True,
        "data": {
            "model": job.checkpoint.index.name,
            "scheme": job.scheme.name,
            "method": job.recipe.method,
            "recipe": job.recipe.as_dict(),
            "key": key,
            "corpus": None
            if c is None or job.corpus is None
            else {
                "name": c.corpus,
                "samples": c.samples,
                "held_out": job.recipe.held_out,
                "sequence_length": c.sequence_length,
                "tokens": c.tokens,
                "domains": job.corpus.domain_counts(),
                "sha256": job.corpus.sha256,
                **({"self": job.self_text.as_dict()} if job.self_text is not None else {}),
            },
            "imatrix": None
            if job.imatrix is None
            else {
                "sha256": job.recipe.imatrix_sha256,
                "datasets": list(job.imatrix.datasets),
                "tokens": job.imatrix.tokens,
                "chunks": job.imatrix.chunks,
                "chunk_size": job.imatrix.chunk_size,
            },
            "quantized_fraction": config.linear_parameters / config.parameters,
            "bits_per_weight": _bits_per_weight(job),
            "types": {name: scheme.name for name, scheme in job.types.items()},
            "tables": mix.tables if mix is not None else dict(job.recipe.tables),
            "allocation": mix.summary if mix is not None else None,
            "events": events,
            "linears": [linear for record in work.records for linear in record["linears"]],
            "rounding": [record["rounding"] for record in work.records if "rounding" in record] or None,
            "tuning": tuned.summary if tuned is not None else None,
            "files": {name: digest for record in work.records for name, digest in record["files"].items()}
            | (tuned.files if tuned is not None else {}),
        },
    }
    write_json(work.path / PERFORMANCE, _performance(work, tuned, mix, measured))
    write_json(work.path / MANIFEST, manifest)
    forget_curvature(work.path)
    return manifest


def _bits_per_weight(job: Job) -> float:
    """Mean over the weights of all linears."""
    config = job.checkpoint.config
    bits = 0.0
    for name, (rows, columns) in config.linears.items():
        bits += rows * columns * job.scheme_of(name).bits_per_weight
    return bits / config.linear_parameters


def _length_events(job: Job) -> list[Event]:
    """Too few tokens for a Hessian of full rank: GPTQ can then lose to RTN."""
    c = job.recipe.corpus
    solver = load_plugin("phi4edge.solvers", job.recipe.method)
    if c is None or not (solver.NEEDS_HESSIAN or job.recipe.whole_hessian):
        return []
    tokens = (c.samples - job.recipe.held_out) * c.sequence_length
    width = max(columns for _, columns in job.checkpoint.config.linear_shapes.values())
    if tokens >= 2 * width:
        return []
    detail = f"{tokens} calibration tokens for {width} input channels; at least {2 * width} are advised"
    return [Event("few_calibration_tokens", "corpus", detail, {"tokens": tokens, "advised": 2 * width})]


def _performance(
    work: Workdir, tuned: Tuned | None, mix: Allocation | None, measured: Mapping[str, float] | None
) -> dict[str, Any]:
    """What the run cost, over all processes that worked on it."""
    blocks = [record["performance"] for record in work.records]
    stages = {
        "allocation_seconds": mix.performance if mix is not None else total_cost([]),
        "curvature_seconds": measured if measured is not None else total_cost([]),
        "solving_seconds": total_cost(blocks),
        "tuning_seconds": tuned.performance if tuned is not None else total_cost([]),
    }
    return {
        **total_cost(list(stages.values())),
        **{name: spent["seconds"] for name, spent in stages.items()},
        "parts_seconds": {
            part: sum(b.get("parts", {}).get(part, 0.0) for b in blocks)
            for part in sorted({part for b in blocks for part in b.get("parts", {})})
        },
        "block_seconds": [b["seconds"] for b in blocks],
        "block_peak_rss_bytes": [b["peak_rss_bytes"] for b in blocks],
    }
