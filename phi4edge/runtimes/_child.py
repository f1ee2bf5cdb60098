"""A native runtime in a child process, spoken to over its pipes: the parent's side (_serving.py is the child's).

Nothing native is loaded into this process: a damaged file or a library built for another CPU ends the child, and that
becomes a :class:`TargetError` with the signal and the runtime's last words.
"""

from __future__ import annotations

__all__ = ["Child", "ChildSession"]

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import phi4edge
from phi4edge.core.errors import InputError, MissingToolError, Phi4EdgeError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.runtimes._api import Logits, Settings, SpeedRequest, SpeedSamples
from phi4edge.runtimes._shared import SharedRows
from phi4edge.runtimes._threads import physical_cores


@dataclass(frozen=True)
class Child:
    """What tells one runtime's child from another's."""

    module: str  # the worker, by its full name
    title: str  # the runtime, as messages name it
    package: str  # its distribution, with the version at hand
    install: str  # how to get it
    signals: Mapping[signal.Signals, str]  # what to do when the child is ended by one
    last_words: tuple[str, ...] = ()  # in what a line of stderr that tells more than the last one has


class ChildSession:
    """An artifact loaded in a child process; use as a context manager."""

    def __init__(self, child: Child, artifact: Path, settings: Settings, load: Mapping[str, Any]) -> None:
        self.artifact, self._kind = artifact, child
        self._ahead: object | None = None  # whose rows the child is making beforehand
        self._at: tuple[int, int] = (0, 0)  # where the rows that were asked for last will be, and how many
        self._shared: SharedRows | None = SharedRows()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  the child's stderr, read when it dies
        self._child = subprocess.Popen(
            [sys.executable, "-m", child.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=_environment(),
            pass_fds=() if self._shared is None else (self._shared.descriptor,),
        )
        self._settings = resolved = replace(settings, threads=settings.threads or physical_cores())
        if self._shared is not None:
            load = {**load, "shared": self._shared.descriptor}
        try:
            answer = self.call({"op": "load", "path": str(artifact), "settings": asdict(resolved), **load})
        except BaseException:
            self.close()
            raise
        self.load_s: float = answer["load_s"]  # model and context, seconds
        self._vocab_size: int = answer["vocab_size"]
        self._details: dict[str, Any] = answer["details"]

    @property
    def vocab_size(self) -> int:
        """Logits a position."""
        return self._vocab_size

    @property
    def details(self) -> Mapping[str, Any]:
        """What the settings came to, as the runtime tells it."""
        return self._details

    @property
    def busy(self) -> int:
        """See :class:`phi4edge.runtimes._api.Session`."""
        return 0 if self._settings.gpu_layers else self._settings.threads or 0

    def add_details(self, more: Mapping[str, Any]) -> None:
        """Add what the parent knows."""
        self._details |= more

    def logits(self, tokens: NDArray[np.int64], *, first: int = 0, progress: Progress = SILENT) -> Iterator[Logits]:
        """See :class:`phi4edge.runtimes._api.Session`; the KV cache is cleared before every row.

        The child is at work on the next row of ``tokens`` while the caller has the logits of one.
        """
        progress.start(self._kind.title, tokens.shape[0], "chunk")
        own = object()
        for number, row in enumerate(tokens):
            if self._ahead is not own:
                self._ask(row, first)
            self._ahead = None
            out = self._rows()
            for following in tokens[number + 1 : number + 2]:
                self._ask(following, first)
                self._ahead = own
            yield out
            progress.advance()
        progress.finish()

    def _ask(self, row: NDArray[np.int64], first: int) -> None:
        self._settle()
        request, rows = {"op": "logits", "tokens": row.tolist(), "first": first}, len(row) - first
        self._at = 0, rows
        if self._shared is not None:
            offset, size = self._shared.place(4 * rows * self._vocab_size)
            self._at = offset, rows
            request |= {"offset": offset, "size": size}
        self._send(request)

    def _rows(self) -> Logits:
        """The answer to :meth:`_ask`, [rows, vocab]."""
        offset, rows = self._at
        if self._shared is not None:
            self._receive()
            return self._shared.rows(offset, (rows, self._vocab_size))
        out = np.empty((rows, self._vocab_size), dtype="<f4")
        view, done = out.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            nbytes = self._receive()["nbytes"]
            self._fill(view[done : done + nbytes])
            done += nbytes
        return out

    def _settle(self) -> None:
        """Take the answer that nobody has taken: the next one's would be mistaken for it."""
        if self._ahead is not None:
            self._ahead = None
            with suppress(Phi4EdgeError):  # a child that died over it says so now
                self._rows()

    def generate(self, tokens: list[int]) -> Iterator[int]:
        """See :class:`phi4edge.runtimes._api.Session`; a token is one request, a small share of what it costs."""
        token: int = self.call({"op": "generate", "tokens": tokens, "fresh": True})["token"]
        while True:
            yield token
            token = self.call({"op": "generate", "tokens": [token], "fresh": False})["token"]

    def speed(self, request: SpeedRequest) -> SpeedSamples:
        """Time a prompt and a generation; the child must have done nothing else before."""
        answer = self.call({"op": "speed", "request": asdict(request)})
        return SpeedSamples(
            prefill_s=tuple(answer["prefill_s"]),
            ttft_s=tuple(answer["ttft_s"]),
            token_s=tuple(tuple(repetition) for repetition in answer["token_s"]),
            load_s=self.load_s,
            peak_rss_bytes=answer["peak_rss_bytes"],
            idle_rss_bytes=answer["idle_rss_bytes"],
            details=self.details,
        )

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self._send(request)
        return self._receive()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        self._settle()
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError as error:
            raise self._death() from error

    def _receive(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise self._refusal(answer["kind"], answer["message"])
        return answer

    def _fill(self, view: memoryview) -> None:
        stream = self._child.stdout
        assert isinstance(stream, io.BufferedReader)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise self._death()
            done += count

    def _refusal(self, kind: str, message: str) -> Phi4EdgeError:
        child = self._kind
        if kind == "missing":
            return MissingToolError(f"{child.package} does not load: {message}", child.install)
        if kind == "settings":
            return UsageError(f"{self.artifact}: {child.title} refuses these settings: {message}", "see --help")
        if kind == "input":
            return InputError(f"{self.artifact}: {child.title} cannot load it: {message}", "write or download it again")
        return TargetError(f"{self.artifact}: {message}", "a shorter --context, or another artifact")

    def _death(self) -> Phi4EdgeError:
        """What to raise when the child is gone."""
        code = self._child.wait()
        self._words.seek(0)
        lines = self._words.read().decode("utf-8", errors="replace").splitlines()
        marks = (*self._kind.last_words, "Error")
        said = next((line for line in lines if any(mark in line for mark in marks)), lines[-1] if lines else "")
        end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = self._kind.signals.get(signal.Signals(-code)) if code < 0 else None
        words = f": {said.strip()}" if said else ""
        return TargetError(f"{self.artifact}: {self._kind.title}'s process {end}{words}", hint)

    def close(self) -> None:
        """End the child; it holds nothing that must be kept."""
        self._child.kill()
        self._child.wait()
        if self._shared is not None:
            self._shared.close()
        for stream in (self._child.stdin, self._child.stdout, self._words):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # a request that the child never read
                    continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environment() -> dict[str, str]:
    """The child finds this very phi4edge, installed or not."""
    root = str(Path(phi4edge.__file__).parent.parent)
    path = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
