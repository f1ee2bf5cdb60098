"""The child's side of a native runtime in a process of its own (_child.py is the parent's).

Requests are JSON lines on stdin; answers are JSON lines on stdout, those with ``nbytes`` followed by as many raw
bytes. Whatever else writes to stdout lands on stderr.

    {"op": "load", "path", "settings", …}           → {"ok", "vocab_size", "load_s", "details"}
    {"op": "logits", "tokens": […], "first": n}     → {"ok", "nbytes"} + bytes, again and again until length − first
                                                      rows of vocab_size float32 have come
    {… "offset": o, "size": s}                      → {"ok"}: the rows lie at offset o of the s bytes of memory that
                                                      both sides see, whose descriptor ``shared`` came with ``load``
    {"op": "generate", "tokens": […], "fresh": b}   → {"ok", "token"}: the most likely one behind all that was fed since
                                                      the last fresh request; stop strings are the parent's business
    {"op": "speed", "request"}                      → {"ok", "prefill_s", "ttft_s", "token_s", …}
    anything that fails                             → {"ok": false, "kind", "message"}
"""

from __future__ import annotations

__all__ = ["Engine", "WorkerError", "most_likely", "random_tokens", "serve", "timed"]

import ctypes
import json
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from phi4edge.core.memory import peak_rss_bytes, rss_bytes
from phi4edge.runtimes._api import SpeedRequest
from phi4edge.runtimes._shared import copy_rows


class WorkerError(Exception):
    """The runtime refused; ``kind`` says whose fault it is: missing, settings, input or runtime."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Engine(Protocol):
    """A runtime with an artifact loaded."""

    vocab_size: int
    load_s: float

    def details(self) -> dict[str, Any]:
        """What the settings came to."""
        ...

    def logits(self, tokens: list[int], first: int) -> Iterator[NDArray[np.float32]]:
        """Logits [length − first, vocab] of one sequence in pieces of rows; a piece may be gone with the next."""
        ...

    def feed(self, tokens: list[int], *, fresh: bool) -> int:
        """Append ``tokens`` to what was fed before (``fresh``: to nothing); the most likely token behind them."""
        ...

    def speed(self, request: SpeedRequest) -> dict[str, Any]:
        """``prefill_s``, ``ttft_s`` and ``token_s`` of :class:`SpeedSamples`."""
        ...


def most_likely(logits: NDArray[np.float32]) -> int:
    """The token of the largest of ``logits`` [vocab], the smallest id of equal ones."""
    if not np.isfinite(logits).all():
        raise WorkerError("runtime", "a logit is not finite")
    return int(logits.argmax())


def random_tokens(request: SpeedRequest, vocab_size: int) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and those that are fed one by one; their values do not matter to a dense model."""
    source = random.Random(request.seed)
    prompt = [source.randrange(vocab_size) for _ in range(request.prompt_tokens)]
    return prompt, [source.randrange(vocab_size) for _ in range(request.gen_tokens)]


def timed(
    request: SpeedRequest,
    prompt: list[int],
    generated: list[int],
    time_prompt: Callable[[list[int]], tuple[float, float]],
    time_tokens: Callable[[list[int]], list[float]],
) -> dict[str, Any]:
    """llama-bench's pp and tg, repeated: all of the one, then all of the other, the warm-up not kept.

    ``time_prompt`` gives seconds of the prompt and until its logits are held, ``time_tokens`` those of every token.
    """
    prefill, ttft, decode = [], [], []
    for repetition in range(-request.warmup, request.repetitions):
        seconds = time_prompt(prompt) if prompt else None
        if seconds and repetition >= 0:
            prefill.append(seconds[0])
            ttft.append(seconds[1])
    for repetition in range(-request.warmup, request.repetitions):
        # One token warms up what a generation touches; the rest would only cost time.
        each = time_tokens(generated[:1] if repetition < 0 else generated) if generated else []
        if each and repetition >= 0:
            decode.append(each)
    return {"prefill_s": prefill, "ttft_s": ttft, "token_s": decode}


def serve(
    load: Callable[[dict[str, Any]], Engine],
    prepare: Callable[[], None],
    more: Callable[[Engine, dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Serve requests until stdin ends; ``prepare`` imports the runtime, ``more`` answers requests of its own."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _serve(sys.stdin.buffer, answers, load, prepare, more)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # the parent has gone, or is telling the user itself


def _serve(
    requests: BinaryIO,
    answers: BinaryIO,
    load: Callable[[dict[str, Any]], Engine],
    prepare: Callable[[], None],
    more: Callable[[Engine, dict[str, Any]], dict[str, Any]] | None,
) -> None:
    engine: Engine | None = None
    memory: mmap.mmap | None = None
    shared = idle_rss = 0
    for line in requests:
        request = json.loads(line)
        try:
            if request["op"] == "load":
                _import(prepare)
                idle_rss = rss_bytes()  # what the interpreter and the bindings take is not the model's
                engine, shared = load(request), request.get("shared", 0)
                body = {"vocab_size": engine.vocab_size, "load_s": engine.load_s, "details": engine.details()}
                _answer(answers, body)
                continue
            assert engine is not None
            if request["op"] == "logits" and "offset" in request:
                if memory is None or len(memory) != request["size"]:
                    memory = mmap.mmap(shared, request["size"])
                at = request["offset"]
                for part in _parts(engine, request["tokens"], request["first"]):
                    at = copy_rows(memory, at, part)
                _answer(answers, {})
            elif request["op"] == "logits":
                _send_logits(answers, engine, request["tokens"], request["first"])
            elif request["op"] == "generate":
                _answer(answers, {"token": engine.feed(request["tokens"], fresh=request["fresh"])})
            elif request["op"] == "speed":
                samples = engine.speed(SpeedRequest(**request["request"]))
                _answer(answers, samples | {"peak_rss_bytes": peak_rss_bytes(), "idle_rss_bytes": idle_rss})
            else:
                assert more is not None
                _answer(answers, more(engine, request))
        except WorkerError as error:
            _answer(answers, {"kind": error.kind, "message": str(error)}, ok=False)


def _parts(engine: Engine, tokens: list[int], first: int) -> Iterator[NDArray[np.float32]]:
    """As many rows as the other side waits for, or an error: it would wait for ever, or take rows for an answer."""
    left = len(tokens) - first
    for part in engine.logits(tokens, first):
        left -= len(part)
        if left < 0:
            break
        yield part
    if left:
        raise WorkerError("runtime", f"the runtime gave {abs(left)} rows of logits too {'few' if left > 0 else 'many'}")


def _send_logits(answers: BinaryIO, engine: Engine, tokens: list[int], first: int) -> None:
    for part in _parts(engine, tokens, first):
        _answer(answers, {"nbytes": part.nbytes})
        answers.write(part.data)
    answers.flush()


def _import(prepare: Callable[[], None]) -> None:
    try:
        prepare()
    except (ImportError, OSError, RuntimeError) as error:  # the two latter where a native library does not load
        raise WorkerError("missing", f"{type(error).__name__}: {error}") from error


def _answer(stream: BinaryIO, body: dict[str, Any], *, ok: bool = True) -> None:
    stream.write(json.dumps({"ok": ok, **body}).encode() + b"\n")
    stream.flush()


def _die_with_parent() -> None:
    """On Linux, have the kernel end this process when the thread that started it ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
