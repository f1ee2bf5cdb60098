"""The process that holds llama.cpp: ``python -m phi4edge.runtimes._llama_worker``, spoken to over its pipes.

llama.cpp lives in a child of its own so that a crash in native code is an error message of ours, and so that peak
RSS is the runtime's alone. Its requests and answers are those of :mod:`phi4edge.runtimes._serving`, and

    {"op": "load", "path", "context", "sequences", "settings"}
    {"op": "sample", "request"}     → {"ok", "written": [[{"prompt", "tokens", "ended"}, …], …]}
"""

from __future__ import annotations

__all__ = ["main"]

import ctypes
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi4edge.runtimes import _serving as serving
from phi4edge.runtimes._api import Settings, SpeedRequest
from phi4edge.runtimes._sampling import SampleRequest, Stream, Written
from phi4edge.runtimes._serving import WorkerError

_FLASH = {"auto": -1, "off": 0, "on": 1}
_LOG_LINES = 400
_DEBUG, _ERROR, _CONTINUED = 1, 4, 5  # ggml's log levels


class Log:
    """The last lines that llama.cpp logged, and its errors apart."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)
        self.errors: deque[str] = deque(maxlen=20)
        self._level = 0

    def receive(self, level: int, text: bytes, _: Any) -> None:
        """Callback of llama_log_set; a line can come in pieces."""
        words = text.decode("utf-8", errors="replace")
        self._level = self._level if level == _CONTINUED else level
        if self._level == _DEBUG:
            return
        if level == _CONTINUED and self.lines:
            self.lines[-1] += words.rstrip("\n")
            return
        self.lines.append(words.rstrip("\n"))
        if self._level == _ERROR:
            self.errors.append(words.strip())

    def reason(self) -> str:
        """The errors in one line, oldest first, or the last words."""
        kept = list(self.errors)[-4:] or [line for line in self.lines if line.strip()][-2:]
        return "; ".join(dict.fromkeys(kept)) or "no reason given"

    def find(self, pattern: str) -> str | None:
        """The first group of the last line that matches, or None."""
        found = self.find_all(pattern)
        return found[-1] if found else None

    def find_all(self, pattern: str) -> list[str]:
        """The first group of every line that matches, blanks squeezed."""
        found = (re.search(pattern, line) for line in self.lines)
        return [" ".join(match[1].split()) for match in found if match]


class Engine:
    """One model and one context of llama.cpp."""

    def __init__(self, path: str, context: int, sequences: int, settings: Settings, log: Log) -> None:
        import llama_cpp

        self._lib, self._log, self._context, self._settings = llama_cpp, log, context, settings
        self._sequences = sequences
        self._callback = llama_cpp.llama_log_callback(log.receive)  # kept: C holds no reference
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        began = time.perf_counter()
        self._model = self._load(path)
        self._ctx = self._begin()
        self.load_s = time.perf_counter() - began
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._batch = llama_cpp.llama_batch_init(settings.batch, 0, 1)
        self._fed = 0  # tokens in the cache of the text that is being generated

    def _load(self, path: str) -> Any:
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = self._settings.gpu_layers
        model = self._lib.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise WorkerError("input", self._log.reason())
        return model

    def _begin(self) -> Any:
        lib, settings = self._lib, self._settings
        params = lib.llama_context_default_params()
        params.n_ctx = self._context * self._sequences
        params.n_batch, params.n_ubatch = settings.batch, settings.ubatch
        params.n_seq_max, params.n_outputs_max, params.n_outputs_max_per_seq = self._sequences, 0, 0
        params.kv_unified = False  # every sequence has cells of its own: attention never walks over the others'
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = _FLASH[settings.flash_attention]
        params.offload_kqv = params.op_offload = settings.gpu_layers != 0  # a build with a GPU computes on the CPU too
        params.type_k = params.type_v = getattr(lib, f"GGML_TYPE_{settings.kv_type.upper()}")
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise WorkerError("settings", self._log.reason())
        return context

    def details(self) -> dict[str, Any]:
        """What the settings came to, as llama.cpp tells it."""
        lib = self._lib
        text = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, text, len(text))
        flash = self._log.find(r"Flash Attention (?:was auto, set to )?(enabled|disabled)")
        known = getattr(lib, "llama_version", None)
        return {
            "model": text.value.decode("utf-8", errors="replace"),
            "weight_bytes": int(lib.llama_model_size(self._model)),
            "parameters": int(lib.llama_model_n_params(self._model)),
            "context": int(lib.llama_n_ctx(self._ctx)),
            "batch": int(lib.llama_n_batch(self._ctx)),
            "ubatch": int(lib.llama_n_ubatch(self._ctx)),
            "threads": self._settings.threads,
            "kv_type": self._settings.kv_type,
            "gpu_layers": self._settings.gpu_layers,
            "flash_attention": {"enabled": "on", "disabled": "off"}.get(flash or "", self._settings.flash_attention),
            "file_type": self._log.find(r"file type\s+= (.+)"),
            "load_mode": self._log.find(r"load_mode = (\w+)"),
            "buffers": self._log.find_all(r"^load_tensors:\s+(\S+ model buffer size =\s+[\d.]+ \w+)"),
            "llama_version": known().decode() if known else None,
            "system": (lib.llama_print_system_info() or b"").decode("utf-8", errors="replace").strip(" |"),
        }

    def _decode(self, tokens: list[int], position: int, first: int) -> None:
        """Submit ``tokens`` from ``position`` on; logits are wanted at positions ≥ ``first``."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = position + i >= first
        code = self._lib.llama_decode(self._ctx, batch)
        if code != 0:
            words = "no room in the KV cache" if code == 1 else self._log.reason()
            raise WorkerError("runtime", f"llama_decode returned {code} at position {position}: {words}")

    def sample(self, request: SampleRequest) -> list[list[Written]]:
        """Let the model write; see :mod:`phi4edge.runtimes._sampling`."""
        lib, batch = self._lib, self._batch
        streams = [Stream(prompts, seed, request) for prompts, seed in zip(request.prompts, request.seeds, strict=True)]
        lib.llama_memory_clear(self._memory, True)
        for _ in range(request.length):
            batch.n_tokens = len(streams)
            for i, stream in enumerate(streams):
                batch.token[i], batch.pos[i] = stream.token, stream.position
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, i, True
            code = lib.llama_decode(self._ctx, batch)
            if code != 0:
                raise WorkerError("runtime", f"llama_decode returned {code} while sampling: {self._log.reason()}")
            for i, stream in enumerate(streams):
                row = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._ctx, i), shape=(self.vocab_size,))
                if not np.isfinite(row).all():
                    raise WorkerError("runtime", "a logit is not finite")
                if stream.take(row):
                    lib.llama_memory_seq_rm(self._memory, i, -1, -1)
        for stream in streams:
            stream.close()
        return [stream.written for stream in streams]

    def logits(self, tokens: list[int], first: int) -> Iterator[NDArray[np.float32]]:
        """Logits [length − first, vocab] of one sequence in pieces of rows; a piece is gone when the next is made."""
        if len(tokens) > self._context:
            raise WorkerError("runtime", f"{len(tokens)} tokens do not fit a context of {self._context}")
        self._lib.llama_memory_clear(self._memory, True)
        for start in range(0, len(tokens), self._settings.batch):
            part = tokens[start : start + self._settings.batch]
            self._decode(part, start, first)
            rows = start + len(part) - max(start, first)
            if rows > 0:
                pointer = self._lib.llama_get_logits(self._ctx)
                yield np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size))

    def feed(self, tokens: list[int], *, fresh: bool) -> int:
        """See :class:`phi4edge.runtimes._serving.Engine`."""
        if fresh:
            self._lib.llama_memory_clear(self._memory, True)
            self._fed = 0
        if self._fed + len(tokens) > self._context:
            raise WorkerError("runtime", f"{self._fed + len(tokens)} tokens do not fit a context of {self._context}")
        last = self._fed + len(tokens) - 1
        for start in range(0, len(tokens), self._settings.batch):
            part = tokens[start : start + self._settings.batch]
            self._decode(part, self._fed, last)
            self._fed += len(part)
        row = self._lib.llama_get_logits_ith(self._ctx, -1)
        return serving.most_likely(np.ctypeslib.as_array(row, shape=(self.vocab_size,)))

    def speed(self, request: SpeedRequest) -> dict[str, Any]:
        """llama-bench's pp and tg: the cache is empty at the start of each, and nothing is sampled."""
        prompt, generated = serving.random_tokens(request, self.vocab_size)
        if self._lib.llama_vocab_get_add_bos(self._vocab):
            for tokens in (prompt, generated):
                tokens[:1] = [self._lib.llama_vocab_bos(self._vocab)] * len(tokens[:1])
        return serving.timed(request, prompt, generated, self._time_prompt, self._time_tokens)

    def _time_prompt(self, tokens: list[int]) -> tuple[float, float]:
        lib = self._lib
        lib.llama_memory_clear(self._memory, True)
        began = time.perf_counter()
        for start in range(0, len(tokens), self._settings.batch):
            self._decode(tokens[start : start + self._settings.batch], start, len(tokens) - 1)
        lib.llama_synchronize(self._ctx)
        finished = time.perf_counter()
        float(lib.llama_get_logits_ith(self._ctx, -1)[0])
        return finished - began, time.perf_counter() - began

    def _time_tokens(self, tokens: list[int]) -> list[float]:
        lib = self._lib
        lib.llama_memory_clear(self._memory, True)
        times = [time.perf_counter()]
        for position, token in enumerate(tokens):
            self._decode([token], position, position)
            lib.llama_synchronize(self._ctx)
            times.append(time.perf_counter())
        return [later - earlier for earlier, later in pairwise(times)]


def _prepare() -> None:
    import llama_cpp  # noqa: F401


def _load(request: dict[str, Any]) -> Engine:
    settings = Settings(**request["settings"])
    return Engine(request["path"], request["context"], request["sequences"], settings, Log())


def _sample(engine: serving.Engine, request: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(engine, Engine)
    assert request["op"] == "sample"
    written = engine.sample(SampleRequest(**request["request"]))
    return {"written": [[asdict(text) for text in texts] for texts in written]}


def main() -> None:
    """Serve requests until stdin ends."""
    serving.serve(_load, _prepare, _sample)


if __name__ == "__main__":
    main()
