"""One drift measurement: a reference, an artifact where it runs, figures, gates, one document."""

from __future__ import annotations

__all__ = [
    "CHUNKS",
    "check_artifact",
    "greedy_on",
    "measure_domains",
    "measure_drift",
    "measure_greedy",
    "measure_on",
    "text_of",
    "without_text",
]

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_json
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.drift import PositionFigures, between_chunks, position_curve, summarize
from phi4edge.measurement.environment import environment
from phi4edge.measurement.gates import Gate, Limits, evaluate
from phi4edge.measurement.greedy import (
    TOKENS,
    chunk_prompts,
    greedy_divergence,
    greedy_texts,
    read_prompts,
    summarize_greedy,
)
from phi4edge.measurement.host import Host, compare_session, open_here, this_machine
from phi4edge.measurement.reference import ReferenceStore, fingerprint, is_store
from phi4edge.model.source import WeightSource
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.runtimes._api import Settings, default_settings, load_runtime

CHUNKS = "chunks"  # prompts: the first tokens of the chunks that are measured


def check_artifact(
    artifact: Path,
    *,
    runtime: str | None = None,
    settings: Settings | None = None,
    source: WeightSource | None = None,
) -> None:
    """Load ``artifact`` and let it go: what is wrong with it is said before a reference is computed for it.

    Raises:
        As :func:`measure_drift`.
    """
    if not artifact.exists():
        raise InputError(f"{artifact}: no such file or folder")
    with open_here(artifact, 8, runtime, settings, source):
        pass


def measure_drift(
    artifact: Path,
    store: ReferenceStore,
    *,
    chunks: int | None = None,
    runtime: str | None = None,
    settings: Settings | None = None,
    limits: Limits | Sequence[Limits] = (),
    source: WeightSource | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """:func:`measure_domains` on one text."""
    return measure_domains(
        artifact,
        {store.header["text"]["name"]: store},
        chunks=chunks,
        runtime=runtime,
        settings=settings,
        limits=limits,
        source=source,
        progress=progress,
    )


def measure_domains(
    artifact: Path,
    stores: Mapping[str, ReferenceStore],
    *,
    chunks: int | None = None,
    runtime: str | None = None,
    settings: Settings | None = None,
    limits: Limits | Sequence[Limits] = (),
    source: WeightSource | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """:func:`measure_on` in a runtime of this machine.

    ``source`` gives the weights of something that only the PyTorch reference can run, such as a run directory.

    Raises:
        InputError: a bad artifact.
        As :func:`measure_on`.
    """
    host = this_machine(artifact, runtime=runtime, settings=settings, source=source)
    return measure_on(host, stores, chunks=chunks, limits=limits, progress=progress)


def measure_on(
    host: Host,
    stores: Mapping[str, ReferenceStore],
    *,
    chunks: int | None = None,
    limits: Limits | Sequence[Limits] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the tokens of ``stores``, by domain, on ``host`` and compare; the ``data`` of a drift document.

    Figures are over all positions of all domains, every position counting the same; where there are several domains,
    each has its own as well, and ``limits`` hold for the whole and for each. ``chunks`` are of each domain.

    Raises:
        UsageError: more chunks than a store has, or none; or domains of several contexts.
        InputError: an artifact of another vocabulary, or one that gives NaN.
        MissingToolError, TargetError: the runtime is not installed, or died.
    """
    began, machine, description = time.perf_counter(), host.environment(), host.description()
    asked = (limits,) if isinstance(limits, Limits) else limits
    counts = {domain: _count(store, chunks) for domain, store in stores.items()}
    one = next(iter(stores.values()))
    if any(_condition(store) != _condition(one) for store in stores.values()):
        raise UsageError("the domains' references differ in model, encoding or context", "compute them together")
    tokens = sum(counts.values()) * one.context
    with host.open(one.context, tokens) as session:
        found = {d: compare_session(host.artifact, session, store, counts[d], progress) for d, store in stores.items()}
        details = dict(session.details)
    figures = PositionFigures.stack(list(found.values()))
    several = len(stores) > 1
    whole, gates = _figures(figures, one.first, asked, None)
    domains = []
    for domain, store in stores.items() if several else ():
        own, own_gates = _figures(found[domain], one.first, asked, domain)
        gates += own_gates
        noise = store.header["noise_floor_kld"]
        domains.append({"name": domain, "text": _text(store, counts[domain]), "noise_floor_kld": noise} | own)
    weights = [found[domain].kld.size for domain in stores]
    floors = [store.header["noise_floor_kld"] for store in stores.values()]
    return {
        "artifact": dict(description),
        **host.place,
        "runtime": {"name": host.runtime, "version": host.version, "settings": details},
        "reference": {
            "model": one.header["model"],
            "fingerprint": one.header["key"]["fingerprint"],
            "dtype": one.header["dtype"],
            "encoding": one.header["encoding"],
            "noise_floor_kld": float(np.average(floors, weights=weights)),
            "tail_mass": float(np.average([s.header.get("tail_mass", 0.0) for s in stores.values()], weights=weights)),
        },
        "text": _texts(stores, counts) if several else _text(one, next(iter(counts.values()))),
        **whole,
        **({"domains": domains} if several else {}),
        "gates": [gate.as_dict() for gate in gates],
        "environment": dict(machine),
        "seconds": time.perf_counter() - began,
    }


def _count(store: ReferenceStore, chunks: int | None) -> int:
    count = store.chunks if chunks is None else chunks
    if not 1 <= count <= store.chunks:
        raise UsageError(f"chunks {count} is not between 1 and the store's {store.chunks}")
    return count


def _condition(store: ReferenceStore) -> tuple[object, ...]:
    return (store.header["key"]["fingerprint"], store.header["encoding"], store.header["dtype"], store.context)


def _figures(
    figures: PositionFigures, first: int, limits: Sequence[Limits], domain: str | None
) -> tuple[dict[str, Any], list[Gate]]:
    """What a document says of some positions, and the gates that they are held against."""
    metrics, spread = summarize(figures), between_chunks(figures)
    data = {
        "metrics": {key: metric.as_dict() for key, metric in metrics.items()},
        "se_between_chunks": spread,
        "per_chunk_kld": figures.kld.mean(axis=1).tolist(),
        "per_chunk": {
            "nll": figures.nll.mean(axis=1).tolist(),
            "nll_reference": figures.nll_reference.mean(axis=1).tolist(),
            "same_top_p": figures.same_top.mean(axis=1).tolist(),
        },
        "per_position": position_curve(figures, first),
    }
    return data, [gate for each in limits for gate in evaluate(each, metrics, spread, domain)]


def text_of(store: ReferenceStore, chunks: int | None) -> dict[str, Any]:
    """The ``text`` of a drift document on the first ``chunks`` chunks of ``store``.

    Raises:
        UsageError: more chunks than it has, or none.
    """
    return _text(store, _count(store, chunks))


def _text(store: ReferenceStore, count: int) -> dict[str, Any]:
    return {
        "name": store.header["text"]["name"],
        "sha256": store.header["text"]["sha256"],
        "context": store.context,
        "chunks": count,
        "positions": count * store.positions,
    }


def _texts(stores: Mapping[str, ReferenceStore], counts: Mapping[str, int]) -> dict[str, Any]:
    """All domains as one text: its hash is over theirs and over how much of each was taken."""
    parts = {domain: _text(store, counts[domain]) for domain, store in stores.items()}
    return {
        "name": " + ".join(stores),
        "sha256": sha256_json({domain: [part["sha256"], part["chunks"]] for domain, part in parts.items()}),
        "context": next(iter(parts.values()))["context"],
        "chunks": sum(part["chunks"] for part in parts.values()),
        "positions": sum(part["positions"] for part in parts.values()),
    }


def measure_greedy(
    artifact: Path,
    stores: Mapping[str, ReferenceStore],
    reference: str,
    prompts: str,
    *,
    count: int = TOKENS,
    chunks: int | None = None,
    runtime: str | None = None,
    settings: Settings | None = None,
    source: WeightSource | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """:func:`greedy_on` in a runtime of this machine."""
    host = this_machine(artifact, runtime=runtime, settings=settings, source=source)
    return greedy_on(host, stores, reference, prompts, count=count, chunks=chunks, progress=progress)


def greedy_on(
    host: Host,
    stores: Mapping[str, ReferenceStore],
    reference: str,
    prompts: str,
    *,
    count: int = TOKENS,
    chunks: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The ``greedy`` of a drift document; ``prompts`` is "chunks", the first tokens of each, or a file of prompts.

    Raises:
        UsageError: ``reference`` is a store, which cannot write.
        InputError: bad prompts, or as :func:`measure_on`.
    """
    if is_store(Path(reference)):
        raise UsageError(f"--greedy: {reference} is a store, which cannot write text", "give the checkpoint")
    checkpoint = open_checkpoint(reference)
    if prompts == CHUNKS:
        given, name = chunk_prompts(list(stores.values()), chunks), "first tokens of the chunks"
    else:
        given, name = read_prompts(Path(prompts), load_tokenizer(checkpoint.index.folder)), Path(prompts).name
    texts = greedy_texts(checkpoint, given, name, count=count, progress=progress)
    longest = max(map(len, texts.prompts)) + count
    with host.open(longest, longest * len(texts.prompts)) as session:
        return summarize_greedy(greedy_divergence(session, texts, progress), texts)


def without_text(
    artifact: Path, reference: str, *, runtime: str | None = None, settings: Settings | None = None
) -> dict[str, Any]:
    """A drift document in which nothing was measured on a text, for what is measured beside it."""
    name = runtime or default_runtime(artifact)
    checkpoint = open_checkpoint(reference)
    return {
        "artifact": describe(artifact),
        "runtime": {
            "name": name,
            "version": load_runtime(name).version(),
            "settings": asdict(settings or default_settings(name)),
        },
        "reference": {"model": checkpoint.index.name, "fingerprint": fingerprint(checkpoint.index)},
        "text": None,
        "metrics": {},
        "gates": [],
        "environment": environment(),
    }
