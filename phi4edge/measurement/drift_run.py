"""One drift measurement from end to end: reference, artifact in its runtime, figures, gates, one document."""

from __future__ import annotations

__all__ = [
    "CHUNKS",
    "Elsewhere",
    "check_artifact",
    "compare_session",
    "measure_domains",
    "measure_drift",
    "measure_greedy",
    "resolve_domains",
    "resolve_reference",
    "text_of",
    "without_text",
]

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_json
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.drift import PositionFigures, between_chunks, compare_chunk, position_curve, summarize
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
from phi4edge.measurement.on_device import Site, open_session
from phi4edge.measurement.reference import ReferenceStore, build_store, fingerprint, is_store, open_store
from phi4edge.measurement.texts import named_texts, read_chunks, text_sha256
from phi4edge.model.source import WeightSource
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.runtimes._api import Session, Settings, default_settings, load_runtime
from phi4edge.runtimes.torch_ref import TorchSession

CHUNKS = "chunks"  # prompts: the first tokens of the chunks that are measured


@dataclass(frozen=True)
class Elsewhere:
    """A runtime that is none of this machine's, such as one in a browser."""

    name: str
    version: str
    open: Callable[[int], Session]  # for a context of so many tokens


def resolve_reference(
    reference: str,
    *,
    text: str | None,
    context: int | None = None,
    chunks: int | None = None,
    store: Path | None = None,
    top: int | None = None,
    progress: Progress = SILENT,
) -> ReferenceStore:
    """The store that ``reference`` is, or the store of the checkpoint that it names on ``text``.

    ``context`` None: 512, or what the store has. ``top``: as :func:`build_store`.
    A store that holds more chunks than asked serves with its first ones.

    Raises:
        UsageError: no text for a checkpoint, or --store beside a store.
        InputError: a bad model, text or store; or a store of another text, context or length.
        ResumeError: ``store`` holds something else.
    """
    if is_store(Path(reference)):
        if store is not None:
            raise UsageError(f"--reference {reference} is a store already", "leave --store out")
        if top is not None:
            raise UsageError(f"--reference {reference} is a store already, in an encoding of its own", "no --store-top")
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
    return build_store(checkpoint, cut, store, progress, top)


def resolve_domains(
    reference: str,
    *,
    texts: Sequence[str],
    context: int | None = None,
    chunks: int | None = None,
    store: Path | None = None,
    top: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, ReferenceStore]:
    """A store for each of ``texts``, ``NAME=PATH`` or a path, by domain; ``store`` then holds a folder for each.

    Raises:
        UsageError: two texts of one name, or several beside a store.
        As :func:`resolve_reference`.
    """
    if len(texts) < 2:
        named = named_texts(texts)
        text = next(iter(named.values()), None)
        found = resolve_reference(
            reference, text=text, context=context, chunks=chunks, store=store, top=top, progress=progress
        )
        return {next(iter(named), found.header["text"]["name"]): found}
    if is_store(Path(reference)):
        raise UsageError(f"--reference {reference} is the store of one text", "give the checkpoint for several")
    return {
        domain: resolve_reference(
            reference,
            text=text,
            context=context,
            chunks=chunks,
            store=None if store is None else store / domain,
            top=top,
            progress=progress,
        )
        for domain, text in named_texts(texts).items()
    }


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
    site: Site | None = None,
    elsewhere: Elsewhere | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the tokens of ``stores``, by domain, through ``artifact`` and compare; the ``data`` of a drift document.

    Figures are over all positions of all domains, every position counting the same; where there are several domains,
    each has its own as well, and ``limits`` hold for the whole and for each. ``chunks`` are of each domain. ``source``
    gives the weights of something that only the PyTorch reference can run, such as a run directory; ``site`` is the
    device that the artifact runs on, in our worker there; ``elsewhere`` takes the place of ``runtime``.

    Raises:
        UsageError: more chunks than a store has, or none; or domains of several contexts.
        InputError: a bad artifact, one of another vocabulary, or one that gives NaN.
        MissingToolError, TargetError: the runtime is not installed, or died.
    """
    began = time.perf_counter()
    machine = environment() if site is None else dict(site.environment)  # its load average is the measurement's
    description = describe(artifact) if site is None else site.describe(artifact)
    name = runtime or default_runtime(artifact)
    settings = settings or default_settings(name)
    asked = (limits,) if isinstance(limits, Limits) else limits
    counts = {domain: _count(store, chunks) for domain, store in stores.items()}
    one = next(iter(stores.values()))
    if any(_condition(store) != _condition(one) for store in stores.values()):
        raise UsageError("the domains' references differ in model, encoding or context", "compute them together")
    tokens = sum(counts.values()) * one.context
    if elsewhere is not None:
        opened = elsewhere.open(one.context)
    else:
        opened = _open(artifact, one.context, runtime, settings, source, site, tokens)
    with opened as session:
        found = {d: compare_session(artifact, session, store, counts[d], progress) for d, store in stores.items()}
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
    version = load_runtime(name).version() if site is None else site.found.packages[name]
    return {
        "artifact": description,
        **({} if site is None else {"target": site.profile.id, "transport": site.device.transport}),
        "runtime": {
            "name": elsewhere.name if elsewhere else name,
            "version": elsewhere.version if elsewhere else version,
            "settings": details,
        },
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
        "environment": machine,
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
    site: Site | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The ``greedy`` of a drift document; ``prompts`` is "chunks", the first tokens of each, or a file of prompts.

    Raises:
        UsageError: ``reference`` is a store, which cannot write.
        InputError: bad prompts, or as :func:`measure_drift`.
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
    settings = settings or default_settings(runtime or default_runtime(artifact))
    with _open(artifact, longest, runtime, settings, source, site, longest * len(texts.prompts)) as session:
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


def _open(
    artifact: Path,
    context: int,
    runtime: str | None,
    settings: Settings,
    source: WeightSource | None,
    site: Site | None = None,
    tokens: int = 0,  # that will go through it
) -> Session:
    name = runtime or default_runtime(artifact)
    if site is not None:
        return open_session(site, artifact, context, name, settings, tokens)
    if source is None:
        return load_runtime(name).open(artifact, context, settings)
    if name != "torch_ref":
        raise UsageError(f"{artifact}: only torch_ref runs this, not {name}", "export it, and measure the artifact")
    return TorchSession(source, context, settings)


def compare_session(
    artifact: Path, session: Session, store: ReferenceStore, count: int, progress: Progress = SILENT
) -> PositionFigures:
    """Figures of the first ``count`` chunks of ``store``, run through ``session``; ``artifact`` is for messages.

    Raises:
        InputError: another vocabulary, or logits that are not finite.
        TargetError: the runtime died.
    """
    if session.vocab_size != store.vocab_size:
        raise InputError(
            f"{artifact}: has a vocabulary of {session.vocab_size}, the reference one of {store.vocab_size}",
            "they are not the same model",
        )
    tokens = store.tokens[:count]
    found = []
    with _cores_left(session):
        for number, logits in enumerate(session.logits(tokens, first=store.first, progress=progress)):
            following = torch.from_numpy(tokens[number, store.first + 1 :])
            try:
                found.append(compare_chunk(torch.from_numpy(logits[:-1]), store.chunk(number), following))
            except InputError as error:
                raise InputError(f"{artifact}: chunk {number}: {error.message}", error.hint) from error
    return PositionFigures.stack(found)


@contextmanager
def _cores_left(session: Session) -> Iterator[None]:
    """Leave the cores that ``session`` is at work on to it: a thread of ours beside each of its own slows both."""
    before = torch.get_num_threads()
    if session.busy:
        torch.set_num_threads(max(1, before - session.busy))
    try:
        yield
    finally:
        torch.set_num_threads(before)
