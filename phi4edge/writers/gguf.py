"""GGUF of architecture phi3, as llama.cpp and its descendants load it, straight from the codes.

Codes and scales go into blocks as they are (:mod:`phi4edge.quant.ggml`), with no float16 file in between and no
second rounding. Embedding and head are rounded without data, to q8_0 unless asked otherwise; norms stay float32.
Fused projections stay fused. :func:`write_f16` writes the unquantized model, the reference of a runtime.

gguf-py lays out the header; the tensors' data is streamed behind it, at most one linear or a slice of rows in RAM,
into one file or several (:mod:`phi4edge.writers._gguf_shards`), hashed as it is written.
"""

from __future__ import annotations

__all__ = ["FORMAT", "SCHEMES", "GgufReader", "matches", "read", "refusal", "write", "write_f16"]

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf

from phi4edge import __version__
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.checkpoint.reader import CheckpointReader
from phi4edge.core.atomic import atomic_files, write_bytes
from phi4edge.core.disk import require_space
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.hashing import sha256_bytes
from phi4edge.model.source import QuantizedModel
from phi4edge.model.tokenizer import Tokenizer, load_tokenizer
from phi4edge.quant.ggml import BLOCK_TYPES, block_type_of, packing_refusal
from phi4edge.quant.scheme import GGML_SCHEMES
from phi4edge.writers._api import Artifact, WriteOptions, check_held
from phi4edge.writers._gguf_metadata import (
    ARCHITECTURE,
    EXCEPTIONS,
    add_config,
    add_origin,
    add_tokenizer,
    check_tokenizer,
)
from phi4edge.writers._gguf_reader import GgufReader, matches, read
from phi4edge.writers._gguf_shards import plan_shards, shard_path, shard_paths, split_name, write_shard
from phi4edge.writers._gguf_tensors import PLAIN, PlannedTensor, plan_tensors
from phi4edge.writers._licence import licence_text
from phi4edge.writers._linears import linears_refusal
from phi4edge.writers._modelfile import modelfile

FORMAT = "gguf"
SCHEMES = f"w4g32, w4g128, {', '.join(GGML_SCHEMES)}"
_TABLE_TYPES = ("q8_0", "q6_k", "f16")
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S,  # every linear in the one type: nothing of the larger mixes
    "q5_k": gguf.LlamaFileType.MOSTLY_Q5_K_S,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become a GGUF, or None when it can. Looks at every code of an 8-bit affine scheme."""
    reason = _shape_refusal(model, options)
    if reason:
        return reason
    try:
        _tokenizer(model.checkpoint)
    except InputError as error:
        return error.message
    for linear in model.linears:
        scheme = model.scheme_of(linear)
        if scheme.grid == "affine" and scheme.bits == 8 and bool((model.load(linear).codes == 0).any()):
            return f"{linear}: holds the code −128, and q8_0 blocks have −127 … 127; quantize with --scheme q8_0"
    return None


def _shape_refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    tables = options.tables(model)
    return _model_refusal(model.config, tables) or linears_refusal(model, packing_refusal, one_scheme=False)


def _model_refusal(config: ModelConfig, tables: Mapping[str, str]) -> str | None:
    """What speaks against the model, or against the types of its head and embedding."""
    if config.q_size != config.hidden_size:
        return (
            f"num_heads × head_dim is {config.q_size} and hidden_size {config.hidden_size}; llama.cpp's phi3 "
            "wants them equal"
        )
    for role, kind in tables.items():
        if kind not in _TABLE_TYPES and kind not in PLAIN:
            return f"{role}: unknown type {kind!r}; known are {', '.join(_TABLE_TYPES)}"
        if config.hidden_size % BLOCK_TYPES[kind].weights:
            return (
                f"{role}: hidden_size {config.hidden_size} is not a multiple of {BLOCK_TYPES[kind].weights}, "
                f"the weights in a {kind} block; f16 has no blocks"
            )
    return None


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the file ``out``; RAM is bounded by one linear.

    Raises:
        InputError: the format cannot hold the model, or ``out`` exists.
        TargetError: there is no room for it.
    """
    check_held(
        FORMAT, _shape_refusal(model, options), SCHEMES
    )  # of the codes, packing finds what does not fit as it goes
    kind = block_type_of(model.scheme)
    assert kind is not None, "refused above"
    plan = plan_tensors(model.rest, options.tables(model), model, kind)
    provenance = {**model.provenance, "scheme": model.scheme.name}
    if model.exceptions:
        provenance[EXCEPTIONS] = json.dumps({linear: scheme.name for linear, scheme in model.exceptions.items()})
    name = Path(provenance.get("base_model", model.checkpoint.index.name)).name
    return _write(model.checkpoint, out, options, plan, _Labels(name, provenance, kind.name, model.scheme.name))


def write_f16(checkpoint: CheckpointReader, out: Path, options: WriteOptions, dtype: str = "f16") -> Artifact:
    """Write the unquantized model: every matrix in ``dtype`` (f16, bf16 or f32), norms in float32.

    float16 cannot hold values beyond 65504, and rounds bfloat16's smallest ones; bf16 holds a bfloat16
    checkpoint exactly.

    Raises:
        InputError: a value exceeds float16 (the tensor is named), or ``out`` exists.
        TargetError: there is no room for it.
    """
    if dtype not in PLAIN:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(PLAIN)}")
    reason = _model_refusal(checkpoint.config, {})
    if reason:
        raise InputError(f"gguf cannot hold this model: {reason}")
    plan = plan_tensors(checkpoint, {"head": dtype, "embedding": dtype}, None, BLOCK_TYPES[dtype])
    name = checkpoint.index.name
    provenance = {"version": __version__, "base_model": name, "method": "none"}
    return _write(checkpoint, out, options, plan, _Labels(name, provenance, dtype, dtype))


@dataclass(frozen=True)
class _Labels:
    """What the file says of itself."""

    name: str
    provenance: Mapping[str, str]
    file_type: str
    scheme: str


def _write(
    checkpoint: CheckpointReader, out: Path, options: WriteOptions, plan: list[PlannedTensor], labels: _Labels
) -> Artifact:
    tokenizer = _tokenizer(checkpoint)
    header = gguf.GGUFWriter(None, ARCHITECTURE)
    add_origin(header, labels.name, checkpoint.index, labels.provenance)
    header.add_file_type(_FILE_TYPES[labels.file_type])
    add_config(header, checkpoint.config)
    add_tokenizer(header, tokenizer, checkpoint.config.vocab_size)
    shards = plan_shards(header, plan, options.split_bytes)
    paths = [out] if len(shards) == 1 else [shard_path(out, i, len(shards)) for i in range(len(shards))]
    old = _check_output(out, paths, options.force, sum(shard.nbytes for shard in shards))
    beside, words = _modelfile(checkpoint, tokenizer, paths, options)
    for note in (*_notes(checkpoint.config, tokenizer), *words):
        options.progress.note(f"{out.name}: {note}")
    options.progress.start(f"export {FORMAT}", len(plan), "tensor")
    digests = []
    try:
        with atomic_files(paths, replaced=old) as files:
            for shard, file in zip(shards, files, strict=False):  # asking for one more would end the last
                digests.append(write_shard(file, shard, options.progress))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})", "nothing was left under that name") from error
    options.progress.finish()
    for path, text in beside.items():
        write_bytes(path, text)
    integer = sum(prod(tensor.shape) for tensor in plan if tensor.type.name not in PLAIN)
    return Artifact(
        path=paths[0],
        format=FORMAT,
        scheme=labels.scheme,
        files={path.name: digest for path, digest in zip(paths, digests, strict=True)}
        | {path.name: sha256_bytes(text) for path, text in beside.items()},
        nbytes=sum(shard.nbytes for shard in shards),
        quantized_fraction=integer / checkpoint.config.parameters,
    )


def _modelfile(
    checkpoint: CheckpointReader, tokenizer: Tokenizer, paths: list[Path], options: WriteOptions
) -> tuple[dict[Path, bytes], list[str]]:
    """Path and text of the Modelfile where one was asked for, and notes on it."""
    if not options.modelfile:
        return {}, []
    if len(paths) > 1:
        raise UsageError("Ollama takes a GGUF in one file", "give --modelfile without --split-size")
    path = paths[0].with_name(f"{paths[0].name.removesuffix('.gguf')}.Modelfile")
    if path.exists() and not options.force:
        raise InputError(f"{path}: already exists", "choose another --out, or pass --force to replace it")
    licence = licence_text(checkpoint.index.folder)
    text, notes = modelfile(paths[0].name, tokenizer, checkpoint.config, context=options.context, licence=licence)
    return {path: text.encode()}, notes


def _tokenizer(checkpoint: CheckpointReader) -> Tokenizer:
    """The tokenizer, after all that a GGUF demands of it was checked."""
    tokenizer = load_tokenizer(checkpoint.index.folder)
    tokenizer.check_vocabulary(checkpoint.config)
    check_tokenizer(tokenizer)
    return tokenizer


def _notes(config: ModelConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Where llama.cpp will not do what the checkpoint says, because a GGUF cannot tell it."""
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        yield (
            f"llama.cpp ignores this architecture's sliding window of {config.sliding_window} tokens; "
            "longer texts get other logits there"
        )
    if config.rope.is_longrope and config.rope.original_context:
        yield (
            f"opened with a context of more than {config.rope.original_context} tokens, llama.cpp takes the long rope "
            "factors for short texts too; open it with no more where that is enough"
        )
    if tokenizer.gguf_pre == "gpt-4o":
        yield (
            "llama.cpp splits words at combining marks (Hindi, Thai, pointed Arabic and Hebrew), this tokenizer does "
            "not; such text becomes more tokens there, of which the model knows less"
        )
    stripping = [e["content"] for e in tokenizer.added.values() if e.get("lstrip") or e.get("rstrip")]
    if stripping:
        yield (
            f"{len(stripping)} special tokens such as {stripping[0]!r} swallow the white space beside them in "
            "tokenizer.json; llama.cpp keeps it"
        )


def _check_output(out: Path, paths: list[Path], force: bool, nbytes: int) -> list[Path]:
    """Refuse a place that is taken or too small; files of an earlier split there, to be removed."""
    if out.is_dir():
        raise InputError(f"{out}: is a folder", "give the name of the .gguf file to write")
    if split_name(out) is not None:
        raise InputError(
            f"{out}: is called as one file of a split", "give the name of the whole; --split-size adds the numbers"
        )
    old = shard_paths(out) if len(paths) > 1 else []
    taken = [path for path in (*paths, *old) if path.exists()]
    if taken and not force:
        raise InputError(f"{taken[0]}: already exists", "choose another --out, or pass --force to replace it")
    require_space(out, nbytes, "this artifact", "free space, or choose another --out")
    return old
