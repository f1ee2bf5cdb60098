"""One drift measurement from end to end: reference, artifact in its runtime, figures, gates, one document."""

from __future__ import annotations

__all__ = ["check_artifact", "measure_drift", "resolve_reference", "without_text"]

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.drift import PositionFigures, between_chunks, compare_chunk, position_curve, summarize
from phi4edge.measurement.environment import environment
from phi4edge.measurement.gates import Limits, evaluate
from phi4edge.measurement.reference import ReferenceStore, build_store, fingerprint, is_store, open_store
from phi4edge.measurement.texts import read_chunks, text_sha256
from phi4edge.model.source import WeightSource
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.runtimes._api import Session, Settings, default_settings, load_runtime
from phi4edge.runtimes.torch_ref import TorchSession


def resolve_reference(
    reference: str,
    *,
    text: str | None,
    context: int | None = None,
    chunks: int | None = None,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> ReferenceStore:
    """The store that ``reference`` is, or the store of the checkpoint that it names on ``text``.

    ``context`` None: 512, or what the store has. A store that holds more chunks than asked serves with its first ones.

    Raises:
        UsageError: no text for a checkpoint, or --store beside a store.
        InputError: a bad model, text or store; or a store of another text, context or length.
        ResumeError: ``store`` holds something else.
    """
    if is_store(Path(reference)):
        if store is not None:
            raise UsageError(f"--reference {reference} is a store already", "leave --store out")
        found = open_store(Path(reference))
        _check_store(found, text, context, chunks)
        return found
    if text is None:
        raise UsageError("a checkpoint as --reference needs a --text", "give a text file, or builtin:eval")
    checkpoint = open_checkpoint(reference)
    tokenizer = load_tokenizer(checkpoint.index.folder)
    tokenizer.check_vocabulary(checkpoint.config)
    cut = read_chunks(text, tokenizer, context=context or 512, chunks=chunks)
    limit = checkpoint.config.context_length
    if cut.tokens.shape[1] > limit:
        raise InputError(
            f"a context of {cut.tokens.shape[1]} exceeds the model's {limit}", f"at most --context {limit}"
        )
    return build_store(checkpoint, cut, store, progress)


def _check_store(store: ReferenceStore, text: str | None, context: int | None, chunks: int | None) -> None:
    if context is not None and context != store.context:
        raise InputError(f"{store.path}: has chunks of {store.context} tokens, --context is {context}")
    if chunks is not None and chunks > store.chunks:
        raise InputError(f"{store.path}: has {store.chunks} chunks, --chunks is {chunks}", "compute a longer store")
    if text is not None:
        held = store.header["text"]
        if text_sha256(text, held["characters"]) != held["sha256"]:
            raise InputError(
                f"{store.path}: was made on the text {held['name']!r}, and {text} is another",
                "leave --text out to measure on the store's own text",
            )


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
    settings = settings or default_settings(runtime or default_runtime(artifact))
    with _open(artifact, 8, runtime, settings, source):
        pass


def measure_drift(
    artifact: Path,
    store: ReferenceStore,
    *,
    chunks: int | None = None,
    runtime: str | None = None,
    settings: Settings | None = None,
    limits: Limits | None = None,
    source: WeightSource | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the store's tokens through ``artifact`` and compare; the ``data`` of a drift document.

    ``source`` gives the weights of something that only the PyTorch reference can run, such as a run directory.

    Raises:
        UsageError: more chunks than the store has, or none.
        InputError: a bad artifact, one of another vocabulary, or one that gives NaN.
        MissingToolError, TargetError: the runtime is not installed, or died.
    """
    began, machine = time.perf_counter(), environment()  # its load average is the one that the measurement met
    description = describe(artifact)
    name = runtime or default_runtime(artifact)
    settings = settings or default_settings(name)
    count = store.chunks if chunks is None else chunks
    if not 1 <= count <= store.chunks:
        raise UsageError(f"chunks {count} is not between 1 and the store's {store.chunks}")
    with _open(artifact, store.context, runtime, settings, source) as session:
        figures = _compare(artifact, session, store, count, progress)
        details = dict(session.details)
    metrics, spread = summarize(figures), between_chunks(figures)
    gates = evaluate(limits or Limits(), metrics, spread)
    return {
        "artifact": description,
        "runtime": {"name": name, "version": load_runtime(name).version(), "settings": details},
        "reference": {
            "model": store.header["model"],
            "fingerprint": store.header["key"]["fingerprint"],
            "dtype": store.header["dtype"],
            "encoding": store.header["encoding"],
            "noise_floor_kld": store.header["noise_floor_kld"],
        },
        "text": {
            "name": store.header["text"]["name"],
            "sha256": store.header["text"]["sha256"],
            "context": store.context,
            "chunks": count,
            "positions": int(figures.nll.size),
        },
        "metrics": {key: metric.as_dict() for key, metric in metrics.items()},
        "se_between_chunks": spread,
        "per_chunk_kld": figures.kld.mean(axis=1).tolist(),
        "per_chunk": {
            "nll": figures.nll.mean(axis=1).tolist(),
            "nll_reference": figures.nll_reference.mean(axis=1).tolist(),
            "same_top_p": figures.same_top.mean(axis=1).tolist(),
        },
        "per_position": position_curve(figures, store.first),
        "gates": [gate.as_dict() for gate in gates],
        "environment": machine,
        "seconds": time.perf_counter() - began,
    }


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


def _open(
    artifact: Path, context: int, runtime: str | None, settings: Settings, source: WeightSource | None
) -> Session:
    name = runtime or default_runtime(artifact)
    if source is None:
        return load_runtime(name).open(artifact, context, settings)
    if name != "torch_ref":
        raise UsageError(f"{artifact}: only torch_ref runs this, not {name}", "export it, and measure the artifact")
    return TorchSession(source, context, settings)


def _compare(
    artifact: Path, session: Session, store: ReferenceStore, count: int, progress: Progress
) -> PositionFigures:
    if session.vocab_size != store.vocab_size:
        raise InputError(
            f"{artifact}: has a vocabulary of {session.vocab_size}, the reference one of {store.vocab_size}",
            "they are not the same model",
        )
    tokens = store.tokens[:count]
    found = []
    for number, logits in enumerate(session.logits(tokens, first=store.first, progress=progress)):
        following = torch.from_numpy(tokens[number, store.first + 1 :])
        try:
            found.append(compare_chunk(torch.from_numpy(logits[:-1]), store.chunk(number), following))
        except InputError as error:
            raise InputError(f"{artifact}: chunk {number}: {error.message}", error.hint) from error
    return PositionFigures.stack(found)
