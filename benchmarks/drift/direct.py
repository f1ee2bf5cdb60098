"""Drift from raw logits in float64 NumPy by the definitions: nothing of phi4edge, nothing of llama-perplexity.

Runs the chunks of TOKENS.npy through transformers in float32 (MODEL), llama-cpp-python (BASE.gguf and ARTIFACT.gguf)
and reads llama-perplexity's file of the base's log-probabilities (BASE.bin). Writes the mean of every figure, by pair:

    transformers → artifact     what `phi4edge drift` measures
    base → artifact             what llama-perplexity measures, before its base is rounded to 16 bits
    base.bin → artifact         with that rounding, and without tokens below e⁻¹⁶: what it prints
    base → base                 exactly 0 by definition
    transformers → base         what is between the two references

    python benchmarks/drift/direct.py MODEL BASE.gguf ARTIFACT.gguf TOKENS.npy BASE.bin THREADS OUT.json
"""

from __future__ import annotations

__all__ = ["main"]

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

Array = NDArray[np.float64]


def log_softmax(logits: NDArray[np.float32]) -> Array:
    """ln of probabilities [positions, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


class Gguf:
    """A GGUF in llama.cpp with its defaults."""

    def __init__(self, path: str, length: int, threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = threads
        params.n_outputs_max = params.n_outputs_max_per_seq = 0
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(length, 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def log_probs(self, tokens: list[int], first: int) -> Array:
        """Of the positions from ``first`` to the last but one."""
        batch = self._batch
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= first
        if llama_cpp.llama_decode(self._context, batch):
            sys.exit("llama_decode failed")
        rows = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._context), shape=(len(tokens) - first, self._vocab)
        )
        return log_softmax(rows[:-1])


def base_file(path: Path, tokens: NDArray[np.int64]) -> Iterator[Array]:
    """Log-probabilities of each chunk as llama-perplexity stored them; the tokens must be ``tokens``."""
    data = np.fromfile(path, dtype=np.uint8)
    context, vocab, chunks = data[8:20].view("<i4")
    count, length = tokens.shape
    if (context, chunks) != (length, count):
        sys.exit(f"{path}: {chunks} chunks of {context} tokens, not {count} of {length}")
    end = 20 + 4 * count * length
    if (data[20:end].view("<i4").reshape(count, length)[:, 1:] != tokens[:, 1:]).any():
        sys.exit(f"{path}: its tokens are not those of the chunks")
    positions, width = length - 1 - length // 2, 2 * ((vocab + 1) // 2) + 4
    stored = data[end:].view("<u2").reshape(count, positions, width)
    for chunk in stored:
        scale, least = np.ascontiguousarray(chunk[:, :4]).view("<f4").T.astype(np.float64)
        yield scale[:, None] * chunk[:, 4 : 4 + vocab] + least[:, None]


def judged(p: Array, q: Array, following: NDArray[np.int64], least: float = -np.inf) -> dict[str, Array]:
    """KLD, both negative log-likelihoods and whether the top token is the same; of P what is above ``least`` counts."""
    rows = np.arange(len(p))
    return {
        "kld": (np.where(p > least, np.exp(p), 0) * (p - q)).sum(axis=1),
        "nll": -q[rows, following],
        "nll_reference": -p[rows, following],
        "same_top": (p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64),
    }


def summary(found: list[dict[str, Array]]) -> dict[str, float]:
    """The figures over all positions."""
    kld, nll, reference, same = (
        np.concatenate([part[key] for part in found]) for key in ("kld", "nll", "nll_reference", "same_top")
    )
    delta = np.exp(-nll) - np.exp(-reference)
    return {
        "kld": float(kld.mean()),
        "kld_max": float(kld.max()),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "kld_median": float(np.median(kld)),
        "ppl": float(np.exp(nll.mean())),
        "ppl_reference": float(np.exp(reference.mean())),
        "ppl_ratio": float(np.exp(nll.mean() - reference.mean())),
        "ln_ppl_ratio": float(nll.mean() - reference.mean()),
        "mean_delta_p": float(delta.mean()),
        "rms_delta_p": float(np.sqrt((delta**2).mean())),
        "same_top_p": float(same.mean()),
    }


def main() -> None:
    """Run all and write the means."""
    folder, base_path, artifact_path, tokens_path, stored_path, threads, out = sys.argv[1:]
    tokens = np.load(tokens_path)
    length = tokens.shape[1]
    first = length // 2
    torch.set_num_threads(int(threads))
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base, artifact = Gguf(base_path, length, int(threads)), Gguf(artifact_path, length, int(threads))
    found: dict[str, list[dict[str, Array]]] = {}
    for row, stored in zip(tokens, base_file(Path(stored_path), tokens), strict=True):
        with torch.inference_mode():
            logits = full(torch.from_numpy(row)[None], use_cache=False, logits_to_keep=length - first).logits[0, :-1]
        exact, b = log_softmax(logits.numpy()), base.log_probs(row.tolist(), first)
        q, following = artifact.log_probs(row.tolist(), first), row[first + 1 :]
        pairs: dict[str, tuple[Any, ...]] = {
            "transformers → artifact": (exact, q, following),
            "base → artifact": (b, q, following),
            "base.bin → artifact": (stored, q, following, -16.0),
            "base → base": (b, base.log_probs(row.tolist(), first), following),
            "transformers → base": (exact, b, following),
        }
        for name, pair in pairs.items():
            found.setdefault(name, []).append(judged(*pair))
        print(f"chunk {len(found['base → base'])} of {len(tokens)}", file=sys.stderr)
    Path(out).write_text(json.dumps({name: summary(parts) for name, parts in found.items()}))


if __name__ == "__main__":
    main()
