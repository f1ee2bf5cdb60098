"""How fast llama.cpp computes on this machine, by the type of the weights; a process of its own, as a bad build dies.

``python -m phi4edge.targets.probe_decode THREADS`` prints one JSON object. For each type a model of two to some dozen
wide layers is written, of random blocks, together far larger than the caches; a few tokens are decoded and a prompt is
run. So the figures are those of llama.cpp's own kernels, unpacking included, and of no model that is to be predicted.

* ``read_gb_s``: bytes of weights ÷ seconds of a decode step, less what the layers cost beside their bytes.
* ``gflop_s``: 2 · weights · tokens ÷ seconds of a prompt.
* ``layer_us``: seconds of a decode step of a model too small to wait for memory, ÷ its layers: what graph, threads'
  meetings, norms and attention cost. A small model on a fast memory is bound by it.
"""

from __future__ import annotations

__all__ = ["KINDS", "PROMPT", "STEPS", "measure_decode"]

import ctypes
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.targets.fit import BLOCKS
from phi4edge.targets.probe_llama import PROBE_MODEL, write_probe_model
from phi4edge.targets.probe_memory import last_level_cache

KINDS = ("f16", "q8_0", "q6_k", "q4_k", "q4_1", "q4_0")
STEPS, PROMPT, PROMPTS = 24, 128, 2
SMALLEST = 192 << 20  # bytes of weights
TIMES_CACHE = 6
_WIDE = replace(
    PROBE_MODEL,
    hidden_size=2048,
    intermediate_size=6144,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rope=replace(PROBE_MODEL.rope, dim=128),
    context_length=1024,
)
_THIN = replace(PROBE_MODEL, num_layers=24, context_length=1024)


def _wide(kind: str, cache: int | None) -> ModelConfig:
    """A model whose linears, stored as ``kind``, are far larger than the cache."""
    weights, size = BLOCKS[kind]
    layer = sum(math.prod(shape) for shape in _WIDE.linear_shapes.values()) * size / weights
    wanted = max(SMALLEST, TIMES_CACHE * (cache or 0))
    return replace(_WIDE, num_layers=max(2, math.ceil(wanted / layer)))


def _linear_bytes(config: ModelConfig, kind: str) -> int:
    weights, size = BLOCKS[kind]
    return config.num_layers * sum(math.prod(s) for s in config.linear_shapes.values()) * size // weights


class _Model:
    """A model in llama.cpp, with a context."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp did not load the probe model")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 512, threads, threads
        params.n_batch = params.n_ubatch = 512
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context for the probe model")

    def run(self, tokens: int, *, fresh: bool) -> float:
        """Seconds of one batch."""
        lib = self.lib
        if fresh:
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = (lib.llama_token * tokens)(*(1 + i % 200 for i in range(tokens)))
        began = time.perf_counter()
        status = lib.llama_decode(self.context, lib.llama_batch_get_one(batch, tokens))
        lib.llama_synchronize(self.context)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for the probe model")
        return time.perf_counter() - began

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def _times(config: ModelConfig, kind: str, threads: int, folder: Path, prompts: int) -> tuple[list[float], list[float]]:
    """Seconds of each decode step and of each prompt."""
    path = folder / f"{kind}.gguf"
    write_probe_model(path, config, kind, "q8_0", repeat=True)
    model = _Model(path, threads)
    try:
        model.run(8, fresh=True)  # pages mapped in, threads started
        steps = [model.run(1, fresh=False) for _ in range(STEPS)]
        return steps, [model.run(PROMPT, fresh=True) for _ in range(prompts)]
    finally:
        model.close()
        path.unlink()


def measure_decode(threads: int, folder: Path, cache: int | None) -> dict[str, Any]:
    """Rates by type, one value a step or prompt, and ``layer_us``; ``folder`` takes some hundred MB for a while."""
    steps, _ = _times(_THIN, "q8_0", threads, folder, 0)
    layer_s = [seconds / _THIN.num_layers for seconds in steps]
    fixed = sorted(layer_s)[len(layer_s) // 2]
    kinds = {}
    for kind in KINDS:
        config = _wide(kind, cache)
        steps, prompts = _times(config, kind, threads, folder, PROMPTS)
        nbytes, flop = _linear_bytes(config, kind), 2 * PROMPT * config.linear_parameters
        kinds[kind] = {
            "bytes": nbytes,
            "read_gb_s": [nbytes / max(s - config.num_layers * fixed, 1e-9) / 1e9 for s in steps],
            "gflop_s": [flop / seconds / 1e9 for seconds in prompts],
        }
    return {"layer_us": [s * 1e6 for s in layer_s], "kinds": kinds}


def main() -> int:
    """Print the measurement; exit status 1 with ``error`` in it when something is missing."""
    threads = int(sys.argv[1])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    try:
        import llama_cpp

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
            """Keep llama.cpp's log off stderr, whose last line is the child's last word."""

        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory(prefix="phi4edge-probe-") as folder:
            found = measure_decode(threads, Path(folder), last_level_cache())
    except (ImportError, OSError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))  # noqa: T201  the child's answer to its parent
        return 1
    print(json.dumps(found | {"threads": threads, "load": load, "version": llama_cpp.__version__}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
