"""The shape of a runtime: one module each, with the names of :class:`Runtime`; logits and speed, nothing rounded.

A runtime gives raw things: float32 logits and seconds. What is made of them (divergences, means, errors) is the
business of ``phi4edge.measurement``. Starts without torch, as a runtime on a device has none.
"""

from __future__ import annotations

__all__ = [
    "ACTIVATIONS",
    "FLASH_ATTENTION",
    "KV_TYPES",
    "Logits",
    "Runtime",
    "Session",
    "Settings",
    "SpeedRequest",
    "SpeedSamples",
    "default_settings",
    "load_runtime",
]

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from phi4edge.core import registry
from phi4edge.core.errors import UsageError
from phi4edge.core.events import Progress

Logits = NDArray[np.float32]
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
ACTIVATIONS = ("none", "q8_0", "q8_k", "int8-b32", "int8-b64", "int8-b128")  # see _activations.py
FLASH_ATTENTION = ("auto", "on", "off")


@dataclass(frozen=True)
class Settings:
    """How a runtime is set up; every one of them can change its arithmetic, so all are recorded."""

    threads: int | None = None  # None: physical cores that this process may use
    batch: int = 512  # tokens submitted at a time
    ubatch: int = 512  # tokens computed at a time
    flash_attention: str = "auto"
    kv_type: str = "f16"  # type of both halves of the KV cache
    gpu_layers: int = 0
    activations: str = "none"  # how torch_ref rounds inputs of linears; a serving runtime rounds as it does

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads {self.threads} is not positive")
        if self.ubatch < 1 or self.batch < self.ubatch:
            raise UsageError(f"batch {self.batch} must hold at least one ubatch of {self.ubatch}, and that one token")
        if self.kv_type not in KV_TYPES:
            raise UsageError(f"unknown KV cache type {self.kv_type!r}", f"known: {', '.join(KV_TYPES)}")
        if self.flash_attention not in FLASH_ATTENTION:
            raise UsageError(f"flash_attention is {self.flash_attention!r}", f"one of {', '.join(FLASH_ATTENTION)}")
        if self.activations not in ACTIVATIONS:
            raise UsageError(f"unknown activations {self.activations!r}", f"one of {', '.join(ACTIVATIONS)}")


class Session(Protocol):
    """An artifact, loaded. Use as a context manager."""

    @property
    def vocab_size(self) -> int:
        """Logits a position."""
        ...

    @property
    def details(self) -> Mapping[str, Any]:
        """What the settings came to: threads, flash attention, instruction sets, types of buffers."""
        ...

    @property
    def busy(self) -> int:
        """Cores of this machine that are at work on the next row of :meth:`logits` while the caller has one."""
        ...

    def logits(self, tokens: NDArray[np.int64], *, first: int = 0, progress: Progress = ...) -> Iterator[Logits]:
        """Logits of every row of ``tokens`` [n, length], from position ``first`` on, each row on its own.

        Yields n arrays [length − first, vocab] float32, in order. An array is the caller's to change, and gone when the
        next one is asked for: copy what shall stay.
        """
        ...

    def generate(self, tokens: list[int]) -> Iterator[int]:
        """What the model goes on with behind ``tokens``: its most likely token, fed again, one by one.

        It has no end of its own: the caller stops, at an ending token, at a stop string (which is text, and the text
        is the tokenizer's) or where the context is full. Of tokens that are equally likely the smallest id is taken.

        Raises:
            TargetError: the runtime fails, the context is full, or a logit is not finite.
        """
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class SpeedRequest:
    """What is timed: llama-bench's two tests, a prompt alone and a generation from an empty cache."""

    prompt_tokens: int = 512
    gen_tokens: int = 128
    repetitions: int = 5
    warmup: int = 1  # repetitions before the first that counts
    seed: int = 0  # of the tokens that are fed; their values do not matter to a dense model

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if min(self.prompt_tokens, self.gen_tokens, self.warmup) < 0 or self.prompt_tokens + self.gen_tokens == 0:
            raise UsageError(
                f"prompt_tokens {self.prompt_tokens}, gen_tokens {self.gen_tokens}, warmup {self.warmup}: "
                "none may be negative, and there must be tokens to time"
            )
        if self.repetitions < 1:
            raise UsageError(f"repetitions {self.repetitions} is not positive")


@dataclass(frozen=True)
class SpeedSamples:
    """Raw times of one process that did nothing else, seconds; warm-up excluded."""

    prefill_s: tuple[float, ...]  # the whole prompt, one value a repetition
    ttft_s: tuple[float, ...]  # from handing over the prompt to holding the first token's logits
    token_s: tuple[tuple[float, ...], ...]  # every generated token, by repetition
    load_s: float  # model and context
    peak_rss_bytes: int  # of the process
    idle_rss_bytes: int  # of the process before the model was loaded
    details: Mapping[str, Any]


class Runtime(Protocol):
    """A runtime module."""

    NAME: str
    KV_TYPE: str  # of the KV cache where nobody says

    def available(self) -> str | None:
        """Why the runtime cannot be used here, or None when it can."""
        ...

    def version(self) -> str:
        """Version of the package that computes."""
        ...

    def open(self, artifact: Path, context: int, settings: Settings) -> Session:
        """Load ``artifact`` for sequences of up to ``context`` tokens.

        Raises:
            InputError: not an artifact that this runtime reads, or a damaged one.
            MissingToolError: the runtime is not installed.
        """
        ...

    def speed(self, artifact: Path, request: SpeedRequest, settings: Settings) -> SpeedSamples:
        """Time ``artifact`` in a process of its own.

        Raises:
            UsageError: this runtime is a reference and serves nothing.
            InputError, MissingToolError: as :meth:`open`.
        """
        ...


def default_settings(runtime: str) -> Settings:
    """The settings of runtime ``runtime`` where nobody says."""
    return Settings(kv_type=load_runtime(runtime).KV_TYPE)


def load_runtime(name: str) -> Runtime:
    """Import runtime ``name``.

    Raises:
        UsageError: there is none of that name; the closest one is offered.
    """
    return cast(Runtime, registry.load("phi4edge.runtimes", name))
