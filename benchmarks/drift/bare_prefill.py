"""llama.cpp and nothing beside it: prefill of given chunks, timed; the process that speed.py holds drift against.

Speaks lines: reads ``FIRST`` (logits are wanted from this position of every chunk on; the chunk's length: none but the
last, which llama.cpp computes anyway), decodes all chunks once, answers ``{"cpu_s", "wall_s"}``. Uses llama-cpp-python
alone, so that nothing of phi4edge is in what is measured.

    python benchmarks/drift/bare_prefill.py MODEL.gguf TOKENS.npy THREADS < requests
"""

from __future__ import annotations

__all__ = ["main"]

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


def prefill(context: Any, batch: Any, tokens: list[int], first: int) -> None:
    """Decode ``tokens`` from an empty cache; logits are wanted from position ``first`` on, and of the last."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = i >= first or i == len(tokens) - 1
    if llama_cpp.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    llama_cpp.llama_synchronize(context)


def main() -> None:
    """Serve requests until stdin ends."""
    path, file, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    chunks = np.load(file)
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = chunks.shape[1]
    params.n_threads = params.n_threads_batch = threads
    params.n_outputs_max = params.n_outputs_max_per_seq = 0
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"{path}: llama.cpp does not load it")
    batch = llama_cpp.llama_batch_init(chunks.shape[1], 0, 1)
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for row in chunks.tolist():
            prefill(context, batch, row, int(line))
        seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
