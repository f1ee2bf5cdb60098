"""Which tensors of an artifact cost most: each put alone into the full-precision model, and each restored alone.

First, cheaply, for every tensor: the relative error of its output on activations of the full-precision model,

    e = mean_t ‖(Ŵ − W) x_t‖² / ‖W x_t‖²

by position and then averaged, so that the attention sink, whose activations are hundreds of times larger, does not
decide alone. For the embedding x_t picks a row; for a norm W is diag(gain). This shows what is damaged. It says
little of cost, as most linears of a sound artifact have about the same e; so tensors are ranked by what they do to
the residual stream, the relative error of the block's output with this one tensor of the artifact (embedding, final
norm and head: e). Then, measured, for those ranked first: ``alone``, mean KLD of the full-precision model with this
one tensor of the artifact; and ``saved``, how much lower the artifact's KLD is with this one tensor in full precision
(paired, position by position). All on the evaluation text, in float32, under the reference's configuration.

Weights are streamed: a block of both models is read once for all models that are measured together, and a model keeps
hidden states of its own only from the first block in which it differs.
"""

from __future__ import annotations

__all__ = ["CHUNKS", "attribute_tensors", "basis_refusal", "output_errors", "stream_errors", "stream_swapped"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.drift import PositionFigures, compare_chunk, mean_with_error
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.model.block import LINEARS, Block, down_input, forward_block, load_block, o_input, rms_norm
from phi4edge.model.forward import embed, head_logits
from phi4edge.model.rope import rotary_table
from phi4edge.model.source import Swapped, WeightSource

CHUNKS = 4  # that tensors are measured on where nobody says
_HIDDEN_BYTES = 2**30  # hidden states of models that are measured together
_ROWS = 16384  # rows of a table in RAM at a time
_OTHER_BASIS = 0.5  # median output error of linears above which the two models' channels are not the same
_CONSPICUOUS = 5.0  # times the median output error of the same kind
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

_FIELDS = {
    "input_layernorm": "input_norm",
    "self_attn.qkv_proj": "qkv",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "post_norm",
    "mlp.gate_up_proj": "gate_up",
    "mlp.down_proj": "down",
}


@torch.inference_mode()
def output_errors(
    full: WeightSource, artifact: WeightSource, tokens: Tensor, progress: Progress = SILENT
) -> dict[str, float]:
    """The relative output error of every tensor on ``tokens`` [chunks, context] int64, by checkpoint name."""
    config = full.config
    rotary = rotary_table(config.rope, tokens.shape[1])
    hidden = embed(full, tokens)
    found = {_EMBEDDING: _relative(embed(artifact, tokens), hidden)}
    progress.start("output errors", config.num_layers, "block")
    for layer in range(config.num_layers):
        ours, theirs, prefix = load_block(artifact, layer), load_block(full, layer), f"model.layers.{layer}."
        sums: dict[str, float] = {}
        for i in range(hidden.shape[0]):
            hidden[i : i + 1], errors = _block_errors(ours, theirs, hidden[i : i + 1], rotary, config)
            for name, error in errors.items():
                sums[prefix + name] = sums.get(prefix + name, 0.0) + error / hidden.shape[0]
        found |= sums
        progress.advance()
    progress.finish()
    ours_gain, gain = artifact.tensor(_NORM), full.tensor(_NORM)
    normed = rms_norm(hidden, torch.ones_like(gain), config.rms_norm_eps)
    found[_NORM] = _relative(normed * ours_gain, normed * gain)
    if not config.tie_word_embeddings:
        found[_HEAD] = _head_error(full, artifact, (normed * gain).flatten(0, 1))
    return found


@torch.inference_mode()
def stream_errors(
    full: WeightSource, artifact: WeightSource, tokens: Tensor, errors: Mapping[str, float], progress: Progress = SILENT
) -> dict[str, float]:
    """Relative error that each tensor alone makes in its block's output; ``errors`` where there is no block."""
    config = full.config
    rotary = rotary_table(config.rope, tokens.shape[1])
    hidden = embed(full, tokens)
    found = {name: error for name, error in errors.items() if ".layers." not in name}
    progress.start("residual stream", config.num_layers, "block")
    for layer in range(config.num_layers):
        ours, theirs, prefix = load_block(artifact, layer), load_block(full, layer), f"model.layers.{layer}."
        mixed = {name: replace(theirs, **{field: getattr(ours, field)}) for name, field in _FIELDS.items()}
        names = {name: f"{prefix}{name}.weight" for name in mixed}
        found |= dict.fromkeys(names.values(), 0.0)
        for i in range(hidden.shape[0]):
            out = forward_block(theirs, hidden[i : i + 1], rotary, config)
            for name, block in mixed.items():
                if errors[names[name]] > 0:
                    error = _relative(forward_block(block, hidden[i : i + 1], rotary, config), out)
                    found[names[name]] += error / hidden.shape[0]
            hidden[i : i + 1] = out
        progress.advance()
    progress.finish()
    return found


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """mean_t ‖ours − theirs‖² / ‖theirs‖² over the last axis."""
    return float(((ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-30)).mean())


def _block_errors(ours: Block, theirs: Block, x: Tensor, rotary: Any, config: Any) -> tuple[Tensor, dict[str, float]]:
    """The full-precision block's output, and the errors of its six tensors."""
    bare = torch.ones_like(theirs.input_norm)
    errors = {}
    first = rms_norm(x, bare, config.rms_norm_eps)
    errors["input_layernorm.weight"] = _relative(first * ours.input_norm, first * theirs.input_norm)
    first = first * theirs.input_norm
    qkv = F.linear(first, theirs.qkv)
    mixed = o_input(qkv, rotary, config)
    o = F.linear(mixed, theirs.o)
    x = x + o
    second = rms_norm(x, bare, config.rms_norm_eps)
    errors["post_attention_layernorm.weight"] = _relative(second * ours.post_norm, second * theirs.post_norm)
    second = second * theirs.post_norm
    gate_up = F.linear(second, theirs.gate_up)
    gated = down_input(gate_up)
    down = F.linear(gated, theirs.down)
    inputs, weights = (first, mixed, second, gated), (ours.qkv, ours.o, ours.gate_up, ours.down)
    for name, put, weight, out in zip(LINEARS, inputs, weights, (qkv, o, gate_up, down), strict=True):
        errors[f"{name}.weight"] = _relative(F.linear(put, weight), out)
    return x + down, errors


def _head_error(full: WeightSource, artifact: WeightSource, x: Tensor) -> float:
    wrong, right = torch.zeros(len(x)), torch.zeros(len(x))
    for start in range(0, full.config.vocab_size, _ROWS):
        rows = slice(start, min(start + _ROWS, full.config.vocab_size))
        out = F.linear(x, full.tensor(_HEAD, rows))
        wrong += (F.linear(x, artifact.tensor(_HEAD, rows)) - out).square().sum(-1)
        right += out.square().sum(-1)
    return float((wrong / right.clamp(min=1e-30)).mean())


@torch.inference_mode()
def stream_swapped(
    base: WeightSource,
    other: WeightSource,
    swaps: Sequence[frozenset[str]],
    tokens: Tensor,
    *,
    first: int = 0,
    progress: Progress = SILENT,
) -> Iterator[list[Tensor]]:
    """Logits of ``base`` with each of ``swaps``, sets of tensors that come from ``other``.

    Yields for every chunk of ``tokens`` [chunks, context] int64 one tensor [context − first, vocab] float32 a swap.
    An empty set is ``base`` itself.
    """
    config = base.config
    rotary = rotary_table(config.rope, tokens.shape[1])
    models = [Swapped(base, other, names, config) for names in swaps]
    shared = embed(base, tokens)
    apart = {i: embed(model, tokens) for i, model in enumerate(models) if _EMBEDDING in model.names}

    def through(block: Block, hidden: Tensor) -> None:
        for row in range(hidden.shape[0]):
            hidden[row : row + 1] = forward_block(block, hidden[row : row + 1], rotary, config)

    progress.start("one tensor at a time", config.num_layers, "block")
    for layer in range(config.num_layers):
        touched = {i for i, model in enumerate(models) if any(f".layers.{layer}." in name for name in model.names)}
        block = load_block(base, layer)
        for i in sorted(touched):
            hidden = apart.setdefault(i, shared.clone())
            through(_exchanged(block, other, layer, models[i].names), hidden)
        for i in set(apart) - touched:
            through(block, apart[i])
        through(block, shared)
        progress.advance()
    progress.finish()
    for number in range(tokens.shape[0]):
        yield [
            head_logits(model, apart.get(i, shared)[number : number + 1, first:])[0] for i, model in enumerate(models)
        ]


def _exchanged(block: Block, other: WeightSource, layer: int, names: frozenset[str] | Any) -> Block:
    prefix = f"model.layers.{layer}."
    found = {
        field: other.tensor(f"{prefix}{name}.weight")
        for name, field in _FIELDS.items()
        if f"{prefix}{name}.weight" in names
    }
    return replace(block, **found)


def basis_refusal(errors: Mapping[str, float]) -> str | None:
    """Why tensors with these output errors cannot be exchanged one by one, or None when they can."""
    median = float(np.median(list(_linears(errors).values())))
    if median <= _OTHER_BASIS:
        return None
    return (
        f"half of the linears have an output error above {median:.2f}: the artifact's channels are not the "
        "reference's. Give --against RUN for a rotated run; channels that AWQ scaled cannot be exchanged"
    )


def _linears(errors: Mapping[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if name.removesuffix(".weight").endswith(LINEARS)}


def attribute_tensors(
    full: WeightSource,
    artifact: WeightSource,
    store: ReferenceStore,
    errors: Mapping[str, float],
    *,
    count: int | None,
    kind_of: Callable[[str], str],
    chunks: int = CHUNKS,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure the ``count`` tensors of ``artifact`` that err most in the residual stream; None: all.

    ``errors`` are its output errors.

    ``full`` is the full-precision model in the artifact's own basis; both compute under the same configuration.
    ``kind_of`` says how a tensor is stored: only what is stored alike has a median to be measured by.

    Raises:
        InputError: a tensor that makes NaN.
    """
    tokens = torch.from_numpy(store.tokens[:chunks])
    stream = stream_errors(full, artifact, tokens, errors, progress)
    ranked = sorted(errors, key=lambda name: -stream[name])
    chosen = [name for name in ranked[:count] if errors[name] > 0]
    alone, saved, whole = _measure(full, artifact, chosen, tokens, store, progress)
    measured = {
        name: (
            mean_with_error("alone_kld", "nat", alone[name].kld),
            mean_with_error("saved_kld", "nat", whole.kld - saved[name].kld),
        )
        for name in chosen
    }
    costliest = sorted(chosen, key=lambda name: -(measured[name][0].value or 0.0))
    rows = [
        {"name": name, "output_error": errors[name], "stream_error": stream[name]}
        | {metric.name: metric.as_dict() for metric in measured[name]}
        for name in costliest
    ]
    return {
        "chunks": int(tokens.shape[0]),
        "positions": int(whole.kld.size),
        "artifact_kld": mean_with_error("artifact_kld", "nat", whole.kld).as_dict(),
        "measured": rows,
        "output_errors": {name: errors[name] for name in ranked},
        "findings": [*_costliest(rows, whole), *_conspicuous(_linears(errors), kind_of)],
    }


def _measure(
    full: WeightSource,
    artifact: WeightSource,
    chosen: Sequence[str],
    tokens: Tensor,
    store: ReferenceStore,
    progress: Progress,
) -> tuple[dict[str, PositionFigures], dict[str, PositionFigures], PositionFigures]:
    """Figures of the full model with each tensor, of the artifact without it, and of the artifact's weights."""
    together = max(1, _HIDDEN_BYTES // (tokens.numel() * full.config.hidden_size * 4))
    swaps = [frozenset({name}) for name in chosen]

    def all_of(base: WeightSource, other: WeightSource, sets: Sequence[frozenset[str]]) -> list[PositionFigures]:
        found: list[PositionFigures] = []
        for start in range(0, len(sets), together):
            part = sets[start : start + together]
            rows: list[list[PositionFigures]] = [[] for _ in part]
            stream = stream_swapped(base, other, part, tokens, first=store.first, progress=progress)
            for number, models in enumerate(stream):
                following = tokens[number, store.first + 1 :]
                for row, logits in zip(rows, models, strict=True):
                    row.append(compare_chunk(logits[:-1], store.chunk(number), following))
            found += [PositionFigures.stack(row) for row in rows]
        return found

    alone = dict(zip(chosen, all_of(full, artifact, swaps), strict=True))
    whole, *restored = all_of(artifact, full, [frozenset(), *swaps])
    return alone, dict(zip(chosen, restored, strict=True)), whole


def _costliest(rows: Sequence[dict[str, Any]], whole: PositionFigures) -> Iterator[str]:
    if rows:
        top, total = rows[0], float(whole.kld.mean())
        yield (
            f"of the tensors measured, {top['name']} costs most: alone {top['alone_kld']['value']:.3g} nat; in full "
            f"precision it would take {top['saved_kld']['value']:.3g} of the weights' {total:.3g} nat away"
        )


def _conspicuous(linears: dict[str, float], kind_of: Callable[[str], str]) -> Iterator[str]:
    by_kind: dict[str, dict[str, float]] = {}
    for name, error in linears.items():
        by_kind.setdefault(kind_of(name), {})[name] = error
    for kind, errors in by_kind.items():
        median = float(np.median(list(errors.values())))
        for name, error in sorted(errors.items(), key=lambda item: -item[1]):
            if median > 0 and error > _CONSPICUOUS * median:
                yield (
                    f"{name} has {error / median:.1f} times the median output error of the linears in {kind}: "
                    "look at its codes, scales and zero points"
                )
