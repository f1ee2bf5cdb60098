"""A folder for ONNX Runtime GenAI: an ONNX graph of Phi3ForCausalLM whose MatMulNBits nodes hold the codes as they are.

The graph is written directly (:mod:`phi4edge.writers._onnx_graph`), the weights stream into its data file with one
linear in RAM (:mod:`phi4edge.quant.matmulnbits_packing` knows the bits). GenAI's own builder would hold the model in
RAM twice over, and rounds a head that it was not told to leave alone.

Activations, KV cache and scales are float32, for the CPU. Where ``accuracy_level`` is 4, as it is unless asked
otherwise, its kernels round inputs of MatMulNBits to int8; where it is 1 they leave them alone and are several times
slower. gate_up_proj becomes two nodes, as GenAI's builder has them. Head and embedding are tables of 8 bits with the
very codes that a GGUF's q8_0 has, or float16. GatherBlockQuantized widens only the rows that are looked up, so the
embedding costs no more RAM than its file: a float32 one of Phi-4-mini would be 2.5 GB. A tied pair is stored once.
"""

from __future__ import annotations

__all__ = ["FORMAT", "SCHEMES", "OnnxReader", "matches", "read", "refusal", "write"]

from collections.abc import Mapping
from pathlib import Path

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.atomic import atomic_directory, write_json
from phi4edge.core.errors import InputError, MissingToolError, UsageError
from phi4edge.core.hashing import sha256_file
from phi4edge.model.source import QuantizedModel
from phi4edge.quant.matmulnbits_packing import packing_refusal
from phi4edge.quant.scheme import GGML_SCHEMES
from phi4edge.writers._api import Artifact, WriteOptions, check_held
from phi4edge.writers._hf_folder import check_output, copy_side_files, model_card
from phi4edge.writers._linears import linears_refusal
from phi4edge.writers._onnx_config import default_context, genai_config, properties
from phi4edge.writers._onnx_file import INSTALL, missing_package
from phi4edge.writers._onnx_graph import build_model
from phi4edge.writers._onnx_names import DATA, GENAI_CONFIG, MODEL
from phi4edge.writers._onnx_reader import OnnxReader, matches, read
from phi4edge.writers._onnx_tensors import place, plan_units, write_units

FORMAT = "onnx"
SCHEMES = "w4g32, w4g64, w4g128, w8g32, w4g32-asym, w8g128-asym, q4_0, q8_0"
_TABLES = ("q8_0", "f16")
_CACHE_STEP = 8  # channel pairs that GroupQueryAttention's kernel turns at a time


def refusal(model: QuantizedModel, options: WriteOptions) -> str | None:
    """Why ``model`` cannot become such a folder, or None when it can."""
    tables = options.tables(model)
    return _model_refusal(model.config, tables) or linears_refusal(model, packing_refusal, one_scheme=False)


def _model_refusal(config: ModelConfig, tables: Mapping[str, str]) -> str | None:
    """What speaks against the model, or against the types of its head and embedding."""
    if config.rope.dim // 2 % _CACHE_STEP:
        return (
            f"rotates {config.rope.dim // 2} pairs of channels a head, and ONNX Runtime's GroupQueryAttention "
            f"wants a multiple of {_CACHE_STEP}"
        )
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        return f"its sliding window of {config.sliding_window} tokens is shorter than its context; not written here"
    for role, kind in tables.items():
        if kind not in _TABLES:
            return f"{role}: type {kind!r}; this writer has {', '.join(_TABLES)} (--{role} q8_0)"
        if kind == "q8_0" and config.hidden_size % GGML_SCHEMES[kind].group_size:
            return f"{role}: hidden_size {config.hidden_size} is not a multiple of 32, a q8_0 block; f16 has no blocks"
    return None


def write(model: QuantizedModel, out: Path, options: WriteOptions) -> Artifact:
    """Write the folder ``out``; RAM is bounded by one linear.

    Raises:
        InputError: the format cannot hold the model, or the place is wrong or too small.
        UsageError: an accuracy level that MatMulNBits does not have.
        MissingToolError: the onnx package is not installed.
    """
    check_held(FORMAT, refusal(model, options), SCHEMES)
    if options.accuracy_level not in (1, 4):
        raise UsageError(
            f"accuracy_level {options.accuracy_level} is neither 1 nor 4",
            "4 rounds activations to int8 and is the fast one, 1 keeps them in float32",
        )
    missing = missing_package()
    if missing:
        raise MissingToolError(missing, INSTALL)
    config, tables = model.config, options.tables(model)
    context = options.context or default_context(config)
    if context > config.context_length:
        raise InputError(
            f"context {context} is more than the {config.context_length} tokens the model was made for",
            f"give at most --context {config.context_length}",
        )
    units = plan_units(model, tables)
    places, nbytes = place(units)
    schemes = {linear: model.scheme_of(linear) for linear in model.linears}
    metadata = properties(model, tables, options.accuracy_level)
    graph = build_model(config, schemes, tables, places, options.accuracy_level, metadata).SerializeToString()
    check_output(model, out, nbytes + len(graph))
    settings = genai_config(model.checkpoint.index.folder, config, context)
    options.progress.start("export onnx", len(units), "tensor")
    try:
        with atomic_directory(out, replace=options.force) as folder:
            (folder / MODEL).write_bytes(graph)
            write_json(folder / GENAI_CONFIG, settings)
            copy_side_files(model, folder)
            card = model_card(
                model, FORMAT, _notes(options.accuracy_level, context), rest=_rest(config, tables), library=_LIBRARY
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            with (folder / DATA).open("wb") as file:
                write_units(file, units, places, options.progress)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})", "nothing was left under that name") from error
    options.progress.finish()
    files = sorted(path for path in out.iterdir() if path.is_file())
    return Artifact(
        path=out,
        format=FORMAT,
        scheme=model.scheme.name,
        files={path.name: sha256_file(path) for path in files},
        nbytes=sum(path.stat().st_size for path in files),
        quantized_fraction=(config.linear_parameters + _table_integers(config, tables)) / config.parameters,
    )


_LIBRARY = "onnxruntime-genai"


def _notes(accuracy_level: int, context: int) -> str:
    rounding = "rounded to int8 in blocks as wide as the weights'" if accuracy_level == 4 else "left in float32"
    return (
        f"For ONNX Runtime GenAI on a CPU. Inputs of MatMulNBits are {rounding} (`accuracy_level` {accuracy_level}). "
        f"`search.max_length` in genai_config.json is {context}: GenAI allocates the KV cache, float32, for that many "
        "tokens when it begins; raise or lower it there."
    )


def _rest(config: ModelConfig, tables: Mapping[str, str]) -> str:
    names = {"q8_0": "rounded to 8 bits in blocks of 32", "f16": "stored in float16"}
    if config.tie_word_embeddings:
        return f"embedding and head are one table, {names[tables['head']]}; norms are float32."
    embedding, head = (f"the {role} is {names[tables[role]]}" for role in ("embedding", "head"))
    return f"{embedding}, {head}; norms are float32."


def _table_integers(config: ModelConfig, tables: Mapping[str, str]) -> int:
    """Parameters of head and embedding that are stored as integer codes."""
    roles = ("head",) if config.tie_word_embeddings else ("head", "embedding")
    return sum(config.vocab_size * config.hidden_size for role in roles if tables[role] == "q8_0")
