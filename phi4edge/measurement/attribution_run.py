"""One attribution from end to end: stages, then tensors, as the ``attribution`` of a drift document."""

from __future__ import annotations

__all__ = ["attribute"]

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.artifact import default_runtime
from phi4edge.measurement.attribution import attribute_stages, under_config
from phi4edge.measurement.reference import ReferenceStore, fingerprint, is_store
from phi4edge.measurement.tensors import CHUNKS, attribute_tensors, basis_refusal, output_errors
from phi4edge.model.source import QuantizedModel, WeightSource
from phi4edge.runtimes._api import Settings
from phi4edge.runtimes.torch_ref import open_source
from phi4edge.writers._api import ArtifactReader


def attribute(
    artifact: Path,
    store: ReferenceStore,
    reference: str,
    *,
    runtime: str | None,
    settings: Settings,
    source: WeightSource | None = None,
    run: QuantizedModel | None = None,
    tensors: int | None = 4,
    chunks: int | None = None,
    tensor_chunks: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Stages of ``artifact`` on ``chunks`` of ``store``, and its ``tensors`` (None: all) that look worst.

    ``reference`` is what the store was asked for by; where it is a store itself, the run's checkpoint gives the
    full-precision weights. Where tensors cannot be measured, ``tensors`` is None and ``tensors_reason`` says why.

    Raises:
        As :func:`attribute_stages` and :func:`attribute_tensors`.
    """
    weights = source or open_source(artifact)
    full, why = _full_precision(reference, store, run)
    found = attribute_stages(
        artifact,
        store,
        weights,
        runtime=runtime or default_runtime(artifact),
        settings=settings,
        run=run,
        reference=full.config if full is not None else None,
        chunks=chunks,
        progress=progress,
    )
    if full is None or tensors == 0:
        return found | {"tensors": None, "tensors_reason": why or "not asked for (--attribute-tensors 0)"}
    ours, used = under_config(weights, full.config), tensor_chunks or min(CHUNKS, chunks or CHUNKS)
    errors = output_errors(full, ours, torch.from_numpy(store.tokens[:used]), progress)
    why = basis_refusal(errors)
    if why is not None:
        return found | {"tensors": None, "tensors_reason": why}
    measured = attribute_tensors(
        full, ours, store, errors, count=tensors, kind_of=_kinds(weights), chunks=used, progress=progress
    )
    return found | {"tensors": measured}


def _full_precision(
    reference: str, store: ReferenceStore, run: QuantizedModel | None
) -> tuple[WeightSource | None, str | None]:
    """The full-precision weights in the artifact's basis, or why there are none."""
    if run is not None:
        if fingerprint(run.checkpoint.index) != store.header["key"]["fingerprint"]:
            raise InputError(
                f"--against is a run of {run.checkpoint.index.name}, whose files are not those of the reference",
                "give the run that the artifact was written from, and its model",
            )
        return run.base or run.checkpoint, None
    if is_store(Path(reference)):
        return None, "the reference is a store, which holds no weights: give the checkpoint, or --against RUN"
    return open_checkpoint(reference), None


def _kinds(weights: WeightSource) -> Callable[[str], str]:
    if isinstance(weights, QuantizedModel):
        return lambda name: weights.scheme_of(name.removesuffix(".weight")).name
    if isinstance(weights, ArtifactReader):
        return weights.stored_type
    return lambda _: "floating point"
