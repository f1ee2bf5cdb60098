"""Where an artifact runs while it is measured: in a runtime of this machine, on a device, in a browser."""

from __future__ import annotations

__all__ = ["Host", "compare_session", "open_here", "this_machine"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.artifact import default_runtime, describe
from phi4edge.measurement.drift import PositionFigures, compare_chunk
from phi4edge.measurement.environment import environment
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.model.source import WeightSource
from phi4edge.runtimes._api import Session, Settings, default_settings, load_runtime
from phi4edge.runtimes.torch_ref import TorchSession


@dataclass(frozen=True)
class Host:
    """A runtime that an artifact can be loaded in, and what a document says of it."""

    artifact: Path
    runtime: str
    version: str
    open: Callable[[int, int], Session]  # for a context of so many tokens, and so many tokens in all
    description: Callable[[], Mapping[str, Any]]  # of the artifact; hashes it
    environment: Callable[[], Mapping[str, Any]]  # of the machine; its load average is the one of that moment
    place: Mapping[str, str] = field(default_factory=dict)  # target and transport, where it is not this machine


def open_here(
    artifact: Path, context: int, runtime: str | None, settings: Settings | None, source: WeightSource | None
) -> Session:
    """``artifact`` in a runtime here; ``source`` gives the weights of what only the PyTorch reference can run.

    Raises:
        UsageError: another runtime is asked to run that.
        InputError: a bad artifact.
        MissingToolError, TargetError: the runtime is not installed, or died.
    """
    name = runtime or default_runtime(artifact)
    chosen = settings or default_settings(name)
    if source is None:
        return load_runtime(name).open(artifact, context, chosen)
    if name != "torch_ref":
        raise UsageError(f"{artifact}: only torch_ref runs this, not {name}", "export it, and measure the artifact")
    return TorchSession(source, context, chosen)


def this_machine(
    artifact: Path,
    *,
    runtime: str | None = None,
    settings: Settings | None = None,
    source: WeightSource | None = None,
) -> Host:
    """What :func:`open_here` opens."""
    name = runtime or default_runtime(artifact)
    return Host(
        artifact,
        name,
        load_runtime(name).version(),
        lambda context, tokens: open_here(artifact, context, name, settings, source),
        partial(describe, artifact),
        environment,
    )


def compare_session(
    artifact: Path, session: Session, store: ReferenceStore, count: int, progress: Progress = SILENT
) -> PositionFigures:
    """Figures of the first ``count`` chunks of ``store``, run through ``session``; ``artifact`` is for messages.

    Raises:
        InputError: another vocabulary, or logits that are not finite.
        TargetError: the runtime died.
    """
    if session.vocab_size != store.vocab_size:
        raise InputError(
            f"{artifact}: has a vocabulary of {session.vocab_size}, the reference one of {store.vocab_size}",
            "they are not the same model",
        )
    tokens = store.tokens[:count]
    found = []
    with _cores_left(session):
        for number, logits in enumerate(session.logits(tokens, first=store.first, progress=progress)):
            following = torch.from_numpy(tokens[number, store.first + 1 :])
            try:
                found.append(compare_chunk(torch.from_numpy(logits[:-1]), store.chunk(number), following))
            except InputError as error:
                raise InputError(f"{artifact}: chunk {number}: {error.message}", error.hint) from error
    return PositionFigures.stack(found)


@contextmanager
def _cores_left(session: Session) -> Iterator[None]:
    """Leave the cores that ``session`` is at work on to it: a thread of ours beside each of its own slows both."""
    before = torch.get_num_threads()
    if session.busy:
        torch.set_num_threads(max(1, before - session.busy))
    try:
        yield
    finally:
        torch.set_num_threads(before)
