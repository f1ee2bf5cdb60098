"""Where an artifact's drift comes from: its way from full precision to the serving runtime, one step at a time.

    reference ─▶ weights ─▶ configuration ─▶ runtime, f32 KV cache ─▶ KV cache as asked
                 └ with a run: its linears ─▶ embedding, head and norms as stored ─▶ format (the artifact read back)

A stage up to ``configuration`` is the float32 forward of :mod:`phi4edge.runtimes.torch_ref`, so a step between two of
them is what changed in weights or configuration and nothing else. Up to ``weights`` the reference's configuration
holds (rope, norm epsilon, heads, window); with its own, where that differs, the artifact makes a step more. The
serving runtime comes in with KV in float32, so its first step is kernels and the rounding of activations alone.
(llama.cpp's flash attention rounds a float32 cache to float16 before it multiplies: under it, f16 adds exactly 0.)

All stages see the same tokens. Of every stage: mean KLD to the reference; what it adds to that of the stage before
(the difference position by position, so what both share cancels out of the error; these add up to the whole, and may be
negative); and its step, KLD(stage before ‖ stage), which is ≥ 0 and 0 only where the logits are bit for bit the same.
KLD is no distance: steps do not add up. An error is the larger of those over positions and between chunks.
"""

from __future__ import annotations

__all__ = ["attribute_stages", "config_differences", "under_config"]

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi4edge.checkpoint.config import ModelConfig, parse_config
from phi4edge.core.errors import InputError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.drift import PositionFigures, compare_chunk, divergence, mean_with_error
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.model.source import QuantizedModel, Swapped, WeightSource
from phi4edge.runtimes._api import Session, Settings, load_runtime
from phi4edge.runtimes.torch_ref import TorchSession

# What changes the forward pass without changing a tensor's shape.
_ARITHMETIC = ("num_heads", "num_kv_heads", "head_dim", "rms_norm_eps", "sliding_window")
_ROPE = ("theta", "dim", "short_factor", "long_factor", "original_context", "attention_factor")
_SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "q_size", "kv_size")
_CLOSE = 1e-6  # relative; an artifact may keep a constant in float32


@dataclass(frozen=True)
class _Stage:
    name: str
    title: str
    session: Session


def config_differences(reference: ModelConfig, artifact: ModelConfig) -> list[dict[str, Any]]:
    """``{field, reference, artifact}`` of everything in which the two compute otherwise.

    Raises:
        InputError: shapes differ, so they are not the same model.
    """
    for name in _SHAPES:
        ours, theirs = getattr(artifact, name), getattr(reference, name)
        if ours != theirs:
            raise InputError(f"{name} is {ours} in the artifact, {theirs} in the reference", "not the same model")
    pairs = [(name, getattr(reference, name), getattr(artifact, name)) for name in _ARITHMETIC]
    pairs += [(f"rope.{name}", getattr(reference.rope, name), getattr(artifact.rope, name)) for name in _ROPE]
    if not reference.rope.is_longrope and not artifact.rope.is_longrope:
        pairs = [pair for pair in pairs if pair[0] != "rope.original_context"]  # nothing reads it then
    found = [(name, theirs, ours) for name, theirs, ours in pairs if not _same(theirs, ours)]
    return [{"field": name, "reference": theirs, "artifact": ours} for name, theirs, ours in found]


def _same(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= _CLOSE * abs(a)
    return a == b


def under_config(source: WeightSource, config: ModelConfig) -> WeightSource:
    """``source`` computing as ``config`` says."""
    changed = {name: getattr(config, name) for name in _ARITHMETIC}
    return Swapped(source, source, frozenset(), replace(source.config, rope=config.rope, **changed))


def attribute_stages(
    artifact: Path,
    store: ReferenceStore,
    weights: WeightSource,
    *,
    runtime: str,
    settings: Settings,
    run: QuantizedModel | None = None,
    reference: ModelConfig | None = None,
    chunks: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure every stage of ``artifact``, whose ``weights`` torch_ref reads, on the first ``chunks`` of ``store``.

    ``run`` is what the artifact was written from; it splits the weights' step in three. ``reference`` is the
    full-precision model's configuration; None: as the store has it.

    Raises:
        InputError: the artifact or the run is another model, or gives NaN; or the store does not say its configuration.
        MissingToolError, TargetError: the runtime is not installed, or died.
    """
    config = reference or _stored_config(store)
    differences = config_differences(config, weights.config)
    count = min(chunks or store.chunks, store.chunks)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stages = _stages(stack, artifact, store, weights, run, config, differences, runtime, settings)
        titles, details = [stage.title for stage in stages], [dict(stage.session.details) for stage in stages]
        figures, steps = _measure(stages, store, count, progress)
    torch.set_num_threads(threads)
    rows = []
    for number, (stage, found) in enumerate(zip(stages, figures, strict=True)):
        before = figures[number - 1].kld if number else np.zeros_like(found.kld)
        measured = {
            "kld": mean_with_error("kld", "nat", found.kld),
            "added_kld": mean_with_error("added_kld", "nat", found.kld - before),
            "step_kld": mean_with_error("step_kld", "nat", steps[number]),
            "same_top_p": mean_with_error("same_top_p", "fraction", found.same_top.astype(np.float64)),
        }
        ln_ratio = mean_with_error("ln_ppl_ratio", "nat", found.nll - found.nll_reference)
        rows.append(
            {
                "stage": stage.name,
                "title": titles[number],
                **{key: value.as_dict() for key, value in measured.items()},
                "ln_ppl_ratio": ln_ratio.as_dict(),
                "settings": details[number],
            }
        )
    return {
        "chunks": count,
        "positions": int(figures[0].kld.size),
        "stages": rows,
        "configuration": differences,
        "not_measured": _absent(runtime, settings, run),
        "findings": _findings(rows, differences),
    }


def _stored_config(store: ReferenceStore) -> ModelConfig:
    raw = store.header.get("config")
    if raw is None:
        raise InputError(
            f"{store.path}: does not say the reference's configuration, as an earlier version made it",
            "give the checkpoint as --reference, or compute the store again",
        )
    return parse_config(raw, f"{store.path}: config")


def _stages(
    stack: ExitStack,
    artifact: Path,
    store: ReferenceStore,
    weights: WeightSource,
    run: QuantizedModel | None,
    config: ModelConfig,
    differences: Sequence[Mapping[str, Any]],
    runtime: str,
    settings: Settings,
) -> list[_Stage]:
    plain = Settings(threads=settings.threads, kv_type="f32")
    found: list[_Stage] = []

    def reference_forward(name: str, title: str, source: WeightSource, how: Settings = plain) -> None:
        found.append(_Stage(name, title, stack.enter_context(TorchSession(source, store.context, how))))

    as_reference = under_config(weights, config)
    if run is None:
        reference_forward("weights", "weights", as_reference)
    else:
        config_differences(config, run.config)  # refuses a run of another model
        linears = {f"{name}.weight" for name in run.linears}
        rest = frozenset(weights.config.tensor_shapes()) - linears
        ours = under_config(run, config)
        reference_forward("linears", "weights: the run's linears", ours)
        mixed = Swapped(ours, weights, rest, as_reference.config)
        reference_forward("tables", "weights: embedding, head, norms", mixed)
        reference_forward("format", "format", as_reference)
    if differences:
        reference_forward("configuration", "configuration", weights)
    if runtime == "torch_ref":
        if settings.activations != "none":
            how = replace(plain, activations=settings.activations)
            reference_forward("activations", f"activations in {settings.activations}", weights, how)
        return found
    module = load_runtime(runtime)
    for kv_type in dict.fromkeys(("f32", settings.kv_type)):
        session = module.open(artifact, store.context, replace(settings, kv_type=kv_type))
        rounded = session.details.get("activations")  # where the runtime says so, as ONNX Runtime's graphs do
        name, title = "runtime", f"{runtime}: kernels, activations{f' in {rounded}' if rounded else ''}"
        if kv_type != "f32":
            name, title = "kv_cache", f"KV cache in {kv_type}"
        found.append(_Stage(name, title, stack.enter_context(session)))
    return found


def _measure(
    stages: Sequence[_Stage], store: ReferenceStore, count: int, progress: Progress
) -> tuple[list[PositionFigures], list[np.ndarray[Any, np.dtype[np.float64]]]]:
    """Figures of each stage against the reference, and its step [chunks, positions], chunk by chunk in lockstep."""
    tokens = store.tokens[:count]
    for stage in stages:
        if stage.session.vocab_size != store.vocab_size:
            raise InputError(
                f"{stage.title}: has a vocabulary of {stage.session.vocab_size}, the reference one of "
                f"{store.vocab_size}",
                "they are not the same model",
            )
    running: list[Iterator[Any]] = [s.session.logits(tokens, first=store.first, progress=progress) for s in stages]
    figures: list[list[PositionFigures]] = [[] for _ in stages]
    steps: list[list[Any]] = [[] for _ in stages]
    for number, chunk in enumerate(zip(*running, strict=True)):
        following = torch.from_numpy(tokens[number, store.first + 1 :])
        reference = store.chunk(number)
        before = None
        for index, logits in enumerate(torch.from_numpy(values[:-1]) for values in chunk):
            try:
                found = compare_chunk(logits, reference, following)
            except InputError as error:
                raise InputError(f"{stages[index].title}: chunk {number}: {error.message}", error.hint) from error
            figures[index].append(found)
            steps[index].append(found.kld if before is None else divergence(before, logits)[None])
            before = logits
    return [PositionFigures.stack(parts) for parts in figures], [np.concatenate(parts) for parts in steps]


def _absent(runtime: str, settings: Settings, run: QuantizedModel | None) -> dict[str, str]:
    """Steps that the table does not have, and why."""
    found = {}
    if run is None:
        found["format"] = "give --against RUN: the weights' step then splits into the run's and the format's"
    if runtime == "torch_ref":
        found["runtime"] = "measured in torch_ref, which has no kernels of its own; export, and measure the artifact"
    elif settings.kv_type == "f32":
        found["kv_cache"] = "the KV cache is in float32"
    return found


def _findings(rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader should know first, in words."""
    said = [
        f"{d['field']} is {_short(d['artifact'])} in the artifact, {_short(d['reference'])} in the reference: "
        "the artifact computes otherwise than its weights were trained"
        for d in differences
    ]
    by_name = {row["stage"]: row for row in rows}
    written = by_name.get("format")
    if written is not None:
        zero = written["step_kld"]["value"] == 0
        said.append(
            "format: the artifact's linears give bit for bit the run's logits"
            if zero
            else "format: the artifact does not hold the run's linears; verify --against names the first tensor"
        )
    largest = max(rows, key=lambda row: row["step_kld"]["value"])
    said.append(
        f"the largest step is {largest['title']}: {largest['step_kld']['value']:.3g} nat, "
        f"of {rows[-1]['kld']['value']:.3g} nat in all"
    )
    return said


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
