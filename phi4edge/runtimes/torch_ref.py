"""The float32 forward pass in PyTorch as a runtime: what the stored weights mean, free of any kernel's rounding.

Reads a checkpoint, or any artifact that a writer of ours reads back, block by block. Drift measured here is the
weights' alone; a serving runtime's drift minus this one is its arithmetic. With ``activations`` the inputs of linears
are rounded as such a runtime rounds them, so that this part of its arithmetic is seen by itself.
"""

from __future__ import annotations

__all__ = [
    "KV_TYPE",
    "NAME",
    "TorchSession",
    "available",
    "open",
    "open_source",
    "sequences_in_ram",
    "speed",
    "version",
]

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core import registry
from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.model.block import unrounded
from phi4edge.model.forward import stream_logits
from phi4edge.model.source import WeightSource
from phi4edge.runtimes._activations import activation_refusal, rounding_of
from phi4edge.runtimes._api import Logits, Settings, SpeedRequest, SpeedSamples
from phi4edge.runtimes._threads import physical_cores
from phi4edge.writers._api import ArtifactReader

NAME = "torch_ref"
KV_TYPE = "f32"  # keys and values are those of one pass, and not stored
_HIDDEN_BYTES = 2**30  # hidden states in RAM at a time; more sequences stream the weights again


def available() -> str | None:
    """None: torch is a dependency of phi4edge."""
    return None


def version() -> str:
    """Version of torch."""
    return str(torch.__version__)


def open_source(artifact: Path) -> WeightSource:
    """The weights in ``artifact``: by the writer whose format it is, else as a full-precision checkpoint.

    Raises:
        InputError: neither, or damaged.
    """
    if not artifact.exists():
        raise InputError(f"{artifact}: no such file or folder")
    for name in registry.names("phi4edge.writers"):
        writer = registry.load("phi4edge.writers", name)
        if writer.matches(artifact):
            source: WeightSource = writer.read(artifact)
            return source
    if artifact.is_file():
        known = ", ".join(registry.names("phi4edge.writers"))
        raise InputError(f"{artifact}: not an artifact of a known format", f"known: {known}; or a checkpoint folder")
    return open_checkpoint(artifact)


def open(artifact: Path, context: int, settings: Settings) -> TorchSession:
    """Open ``artifact``; weights are read when logits are asked for.

    Raises:
        InputError: see :func:`open_source`; or longer sequences than the model was made for.
    """
    return TorchSession(open_source(artifact), context, settings)


def speed(artifact: Path, request: SpeedRequest, settings: Settings) -> SpeedSamples:
    """Always raises: a reference serves nothing.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"{artifact}: torch_ref is a reference and serves nothing, so it has no speed",
        "export the model to a format that a runtime serves, for example gguf, and bench that",
    )


class TorchSession:
    """A source of weights as a runtime's session."""

    def __init__(self, source: WeightSource, context: int, settings: Settings) -> None:
        limit = source.config.context_length
        if context > limit:
            raise InputError(f"a context of {context} exceeds the model's {limit}", f"give --context {limit} or less")
        reason = activation_refusal(settings.activations, source.config)
        if reason:
            raise InputError(reason)
        self._source, self._context = source, context
        self._rounded = rounding_of(settings.activations)
        self._rounded_head = self._rounded if _integer_head(source) else unrounded
        self._threads = settings.threads or physical_cores()
        self._details = {"threads": self._threads, "dtype": "float32", "device": "cpu"}
        if settings.activations != "none":
            self._details["activations"] = settings.activations

    @property
    def vocab_size(self) -> int:
        """Logits a position."""
        return self._source.config.vocab_size

    @property
    def details(self) -> Mapping[str, Any]:
        """Threads, dtype and device, and activations where they are rounded."""
        return self._details

    @property
    def busy(self) -> int:
        """See :class:`phi4edge.runtimes._api.Session`: a row is computed when it is asked for."""
        return 0

    def logits(self, tokens: NDArray[np.int64], *, first: int = 0, progress: Progress = SILENT) -> Iterator[Logits]:
        """See :class:`phi4edge.runtimes._api.Session`; all rows go through a block before the next is read."""
        group = sequences_in_ram(self._source, tokens.shape[1])
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            for start in range(0, tokens.shape[0], group):
                part = torch.from_numpy(tokens[start : start + group])
                found = stream_logits(
                    self._source,
                    part,
                    first=first,
                    progress=progress,
                    rounded=self._rounded,
                    rounded_head=self._rounded_head,
                )
                for logits in found:
                    yield logits.numpy()
        finally:
            torch.set_num_threads(before)

    def generate(self, tokens: list[int]) -> Iterator[int]:
        """See :class:`phi4edge.runtimes._api.Session`; every token reads all weights and computes the whole text."""
        fed = list(tokens)
        while True:
            if len(fed) > self._context:
                raise TargetError(f"{len(fed)} tokens do not fit a context of {self._context}")
            (logits,) = self.logits(np.array([fed]), first=len(fed) - 1)
            if not np.isfinite(logits).all():
                raise TargetError("a logit is not finite", "the weights are damaged")
            fed.append(int(logits[0].argmax()))
            yield fed[-1]

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def _integer_head(source: WeightSource) -> bool:
    """Whether ``source`` is an artifact whose head is stored in integers: only then a runtime rounds its input."""
    name = "model.embed_tokens" if source.config.tie_word_embeddings else "lm_head"
    return isinstance(source, ArtifactReader) and source.holds_integers(name)


def sequences_in_ram(source: WeightSource, length: int) -> int:
    """How many sequences of ``length`` tokens have their hidden states in RAM together."""
    return max(1, _HIDDEN_BYTES // (length * source.config.hidden_size * 4))
