"""The process that holds ONNX Runtime GenAI: ``python -m phi4edge.runtimes._onnx_worker``, spoken to over its pipes.

Its requests and answers are those of :mod:`phi4edge.runtimes._serving`; ``load`` has ``context``, and ``whole_beyond``
for a graph that chooses its rotation by the length of what it has been given: a longer sequence is submitted in one
piece, as the keys of its beginning would otherwise have been turned by the other factors.

Tokens are appended to one generator, which is GenAI's own way to a prompt and to a token; ``rewind_to(0)`` empties it.
"""

from __future__ import annotations

__all__ = ["main"]

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi4edge.runtimes import _serving as serving
from phi4edge.runtimes._api import Settings, SpeedRequest
from phi4edge.runtimes._serving import WorkerError


class Engine:
    """One model and one generator of ONNX Runtime GenAI."""

    def __init__(self, path: str, context: int, whole_beyond: int | None, settings: Settings) -> None:
        import onnxruntime_genai

        self._lib, self._context, self._whole_beyond, self._settings = (
            onnxruntime_genai, context, whole_beyond, settings,
        )  # fmt: skip
        self.vocab_size = int(json.loads(Path(path, "genai_config.json").read_text())["model"]["vocab_size"])
        began = time.perf_counter()
        try:
            config = onnxruntime_genai.Config(path)
            options = {"session_options": {"intra_op_num_threads": settings.threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
            config.clear_providers()  # without one it is the CPU
            self._model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            raise WorkerError("input", str(error)) from error
        self._generator = self._begin()
        self._fed: list[int] = []  # of the text that is being generated
        self.load_s = time.perf_counter() - began

    def _begin(self) -> Any:
        params = self._lib.GeneratorParams(self._model)
        params.set_search_options(max_length=self._context)
        try:
            return self._lib.Generator(self._model, params)  # allocates the KV cache
        except RuntimeError as error:
            raise WorkerError("runtime", str(error)) from error

    def details(self) -> dict[str, Any]:
        """What the settings came to."""
        from importlib.metadata import version

        return {
            "threads": self._settings.threads,
            "context": self._context,
            "batch": self._settings.batch,
            "whole_beyond": self._whole_beyond,
            "provider": "cpu",
            "onnxruntime": version("onnxruntime"),
        }

    def _pieces(self, tokens: list[int]) -> Iterator[list[int]]:
        whole = self._whole_beyond is not None and len(tokens) > self._whole_beyond
        step = len(tokens) if whole else self._settings.batch
        for start in range(0, len(tokens), step):
            yield tokens[start : start + step]

    def _append(self, tokens: list[int]) -> None:
        try:
            self._generator.append_tokens(np.array(tokens, dtype=np.int32))
        except RuntimeError as error:
            raise WorkerError("runtime", str(error)) from error

    def logits(self, tokens: list[int], first: int) -> Iterator[NDArray[np.float32]]:
        """Logits [length − first, vocab] of one sequence in pieces of rows."""
        if len(tokens) > self._context:
            raise WorkerError("runtime", f"{len(tokens)} tokens do not fit a context of {self._context}")
        self._generator.rewind_to(0)
        position = 0
        for piece in self._pieces(tokens):
            self._append(piece)
            skipped = min(max(first - position, 0), len(piece))
            position += len(piece)
            if skipped < len(piece):
                found = self._generator.get_output("logits")
                if found.shape != (1, len(piece), self.vocab_size):
                    raise WorkerError("input", f"logits are {list(found.shape)} for {len(piece)} tokens")
                yield np.ascontiguousarray(found[0, skipped:], dtype="<f4")

    def feed(self, tokens: list[int], *, fresh: bool) -> int:
        """See :class:`phi4edge.runtimes._serving.Engine`.

        A text that grows beyond ``whole_beyond`` is submitted again, so that all its keys are turned alike.
        """
        before = 0 if fresh else len(self._fed)
        self._fed = [*self._fed[:before], *tokens]
        if len(self._fed) > self._context:
            raise WorkerError("runtime", f"{len(self._fed)} tokens do not fit a context of {self._context}")
        if self._whole_beyond is not None and 0 < before <= self._whole_beyond < len(self._fed):
            before = 0
        if before == 0:
            self._generator.rewind_to(0)
        for piece in self._pieces(self._fed) if before == 0 else [tokens]:
            self._append(piece)
        return serving.most_likely(self._generator.get_logits().reshape(-1)[-self.vocab_size :])

    def speed(self, request: SpeedRequest) -> dict[str, Any]:
        """A prompt and a generation, each from an empty cache; nothing is sampled."""
        prompt, generated = serving.random_tokens(request, self.vocab_size)
        return serving.timed(request, prompt, generated, self._time_prompt, self._time_tokens)

    def _time_prompt(self, tokens: list[int]) -> tuple[float, float]:
        self._generator.rewind_to(0)
        began = time.perf_counter()
        for piece in self._pieces(tokens):
            self._append(piece)
        finished = time.perf_counter()
        float(self._generator.get_logits()[0, 0, 0])
        return finished - began, time.perf_counter() - began

    def _time_tokens(self, tokens: list[int]) -> list[float]:
        self._generator.rewind_to(0)
        times = [time.perf_counter()]
        for token in tokens:
            self._append([token])
            times.append(time.perf_counter())
        return [later - earlier for earlier, later in pairwise(times)]


def _prepare() -> None:
    import onnxruntime_genai  # noqa: F401


def _load(request: dict[str, Any]) -> Engine:
    return Engine(request["path"], request["context"], request["whole_beyond"], Settings(**request["settings"]))


def main() -> None:
    """Serve requests until stdin ends."""
    serving.serve(_load, _prepare)


if __name__ == "__main__":
    main()
