"""A native runtime in a process of its own, spoken to over its pipes: our side (_serving.py is the other one).

Nothing native is loaded into this process: a damaged file or a library built for another CPU ends the other, and that
becomes a :class:`TargetError` with the signal and the runtime's last words. The process is a child of ours, or it runs
on a device (:class:`Place`); the requests and the answers are the same.
"""

from __future__ import annotations

__all__ = ["Child", "ChildSession"]

import io
import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phi4edge.core.errors import InputError, MissingToolError, Phi4EdgeError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.runtimes._api import Logits, Settings, SpeedRequest, SpeedSamples
from phi4edge.runtimes._shared import SharedRows
from phi4edge.runtimes._threads import physical_cores
from phi4edge.runtimes._worker import LocalWorker, Place, Worker

_PIECE = 1 << 20  # bytes of logits that are taken at a time from a stream that cannot fill a buffer


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
    """An artifact loaded in another process; use as a context manager."""

    def __init__(
        self, child: Child, artifact: Path, settings: Settings, load: Mapping[str, Any], place: Place | None = None
    ) -> None:
        self.artifact, self._kind = artifact, child
        self._ahead: object | None = None  # whose rows the child is making beforehand
        self._at: tuple[int, int] = (0, 0)  # where the rows that were asked for last will be, and how many
        self._shared: SharedRows | None = None
        self._child: Worker
        if place is None:
            self._shared = SharedRows()
            load = {**load, "shared": self._shared.descriptor}
            self._child = LocalWorker(child.module, self._shared.descriptor)
        else:
            self._child = place.start(child.module)
        path = str(artifact) if place is None else place.path
        threads = settings.threads or (physical_cores() if place is None else place.threads)
        self._settings, self._here = replace(settings, threads=threads), place is None
        try:
            answer = self.call({"op": "load", "path": path, "settings": asdict(self._settings), **load})
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
        return self._settings.threads or 0 if self._here and not self._settings.gpu_layers else 0

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
        self._settle()
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except ConnectionError as error:  # a broken pipe is one
            raise self._death() from error

    def _receive(self) -> dict[str, Any]:
        line = self._child.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        try:
            answer: dict[str, Any] = json.loads(line)
            fine = answer.pop("ok")
        except (ValueError, KeyError, AttributeError) as error:  # something else speaks there: a login script, say
            said = line[:80].decode("utf-8", errors="replace").strip()
            raise TargetError(
                f"{self.artifact}: what should be {self._kind.title}'s worker answered {said!r}",
                "the start files of the device's shell may print something; they must not without a terminal",
            ) from error
        if not fine:
            raise self._refusal(answer["kind"], answer["message"])
        return answer

    def _fill(self, view: memoryview) -> None:
        stream, done = self._child.stdout, 0
        while done < len(view):
            if isinstance(stream, io.BufferedReader):
                count = stream.readinto(view[done:])
            else:
                piece = stream.read(min(len(view) - done, _PIECE))
                count = len(piece)
                view[done : done + count] = piece
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
        """What to raise when the worker is gone."""
        code, said = self._child.ending((*self._kind.last_words, "Error"))
        ended_by = _signal(code)
        end = f"was ended by {ended_by.name}" if ended_by else f"ended with exit code {code}"
        hint = self._kind.signals.get(ended_by) if ended_by else None
        words = f": {said}" if said else ""
        return TargetError(f"{self.artifact}: {self._kind.title}'s process {end}{words}", hint)

    def close(self) -> None:
        """End the worker; it holds nothing that must be kept."""
        self._child.close()
        if self._shared is not None:
            self._shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _signal(code: int) -> signal.Signals | None:
    """The signal that an exit status above 128 stands for."""
    try:
        return signal.Signals(code - 128)
    except ValueError:
        return None
