"""For the tests of GGUF: libggml's own kernels, llama.cpp on a file, and quantized models of any scheme."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray
from scripts import load_script
from torch import Tensor

from phi4edge.model.source import WeightSource
from phi4edge.quant.ggml import BlockType

peer = load_script("benchmarks/peers/libggml.py")


@cache
def libggml() -> ctypes.CDLL:
    """The libggml that llama.cpp computes with, its rounding declared too."""
    library: ctypes.CDLL = peer.libggml()
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def traits(kind: BlockType) -> Any:
    return peer.traits(kind.code)


def libggml_dequantize(kind: BlockType, packed: Tensor) -> Tensor:
    """What libggml reads from blocks uint8 [rows, bytes of a row]."""
    data = packed.contiguous().numpy()
    values = peer.to_float(kind.code, data, data.size // kind.nbytes * kind.weights)
    return torch.from_numpy(values).reshape(packed.shape[0], -1)


def libggml_quantize(kind: BlockType, values: Tensor, imatrix: Tensor | None = None) -> Tensor:
    """libggml's own rounding of [rows, in_features] float32, with the importance [in_features] of each channel."""
    data = np.ascontiguousarray(values.numpy())
    weights = None if imatrix is None else np.ascontiguousarray(imatrix.numpy())
    out = np.empty((data.shape[0], kind.row_bytes(data.shape[1])), dtype=np.uint8)
    written = libggml().ggml_quantize_chunk(
        kind.code, data.ctypes.data, out.ctypes.data, 0, data.shape[0], data.shape[1],
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    assert written == out.nbytes
    return torch.from_numpy(out)


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Swallow llama.cpp's log."""


class Llama:
    """llama.cpp on a file, through its C interface; a context manager."""

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocab_only, 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self.model)

    def logits(self, tokens: NDArray[np.int64], context: int, kv_type: int = llama_cpp.GGML_TYPE_F32) -> Tensor:
        """Logits [length, vocab] of one sequence, in a context of ``context`` tokens."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_seq_max, params.n_threads, params.n_threads_batch = 1, 1, 1
        params.type_k = params.type_v = kv_type
        params.flash_attn_type = 0  # off: its accumulation is float16
        ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert ctx, "llama.cpp makes no context"
        assert llama_cpp.llama_n_ctx(ctx) == context, "a context is rounded up to a multiple of 256"
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens.tolist()):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
                batch.seq_id[i][0] = 0
            assert llama_cpp.llama_decode(ctx, batch) == 0
            size = llama_cpp.llama_vocab_n_tokens(self.vocab)
            rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), shape=(len(tokens), size))
            return torch.from_numpy(rows.copy())
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(ctx)

    def greedy(self, prompt: list[int], count: int, context: int) -> list[int]:
        """The ``count`` most likely tokens behind ``prompt``, one after the other, in a context of ``context``."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = 1, 1, 1
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = 0
        ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert ctx, "llama.cpp makes no context"
        assert llama_cpp.llama_n_ctx(ctx) == context, "a context is rounded up to a multiple of 256"
        try:
            size, found, given = llama_cpp.llama_vocab_n_tokens(self.vocab), list[int](), prompt
            while len(found) < count:
                ids = (llama_cpp.llama_token * len(given))(*given)
                assert llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(ids, len(given))) == 0
                row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), shape=(size,))
                given = [int(row.argmax())]
                found += given
            return found
        finally:
            llama_cpp.llama_free(ctx)

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of ``text`` without added bos."""
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, parse_special)
        assert count >= 0
        return list(ids[:count])


def transformers_logits(source: WeightSource, tokens: Tensor) -> Tensor:
    """transformers' Phi3ForCausalLM on ``source``'s weights, float32."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**{k: v for k, v in source.config.raw.items() if k != "torch_dtype"})
    config._attn_implementation = "eager"
    model = Phi3ForCausalLM(config).eval()
    state = {name: source.tensor(name) for name in source.config.tensor_shapes()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if source.config.tie_word_embeddings else [])
    with torch.inference_mode():
        return model(tokens[None]).logits[0]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def tokens_of(length: int) -> Tensor:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(3))
