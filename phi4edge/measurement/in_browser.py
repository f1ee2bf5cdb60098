"""Speed and drift of a GGUF in a browser: what the page is asked, and what is made of its answers.

The figures are those of the other runtimes, with these differences, which stand in the document:

    load_s       from the moment that the model's last byte is in WebAssembly's memory; the transfer stands beside it
    ttft_s       holding a logit means asking for the most likely token, for which wllama takes the softmax and sorts
    decode       a step goes from the page to wllama's worker and back
    KLD, PPL     over the whole vocabulary, from the float32 probabilities that wllama gives; every scored position is
                 decoded by itself, where llama-perplexity decodes a batch, which can round differently
                 (wllama sorts the vocabulary to give it: .1 s for 200,064 tokens on a PC's core that does nothing else,
                 and 800 kB go to this machine)
    peak RSS     not measured: a browser tells no page what memory it takes

Everything that a page says of its device is the browser's word, and browsers round it or leave it out. All of this was
run in Chromium on a PC; on a phone, and in Safari, it is not measured on hardware.
"""

from __future__ import annotations

__all__ = ["BrowserSession", "measure_drift_in_browser", "measure_speed_in_browser"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phi4edge.core.errors import TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.artifact import describe
from phi4edge.measurement.browser_guest import Guest, Told
from phi4edge.measurement.drift_run import measure_on
from phi4edge.measurement.gates import Limits
from phi4edge.measurement.host import Host
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.measurement.result import Measurement
from phi4edge.measurement.speed import summarize_speed
from phi4edge.runtimes._api import Logits, SpeedRequest, SpeedSamples
from phi4edge.runtimes._serving import random_tokens
from phi4edge.transports._page_messages import Decoded, Hello, Prefilled, Row
from phi4edge.transports.browser import runtime_version

_LEAST = np.float32(1e-45)  # below every probability that float32 holds
_SUM = 1e-3  # by how much probabilities may miss 1: wllama adds them up in float32
_NO_MEMORY = "a browser tells no page what memory it takes"


def measure_speed_in_browser(guest: Guest, *, target: str, request: SpeedRequest | None = None) -> dict[str, Any]:
    """Time the guest in the browser that opens its link; the ``data`` of a bench document.

    Raises:
        MissingToolError: the WebAssembly runtime is not here, or nobody opened the link.
        TargetError: the page failed or was closed; the message says what was measured until then.
    """
    request = request or SpeedRequest()
    description = describe(guest.artifact)
    prompt, generated = random_tokens(request, guest.vocab_size)
    work = {
        "prompt": prompt,
        "generated": generated,
        "repetitions": request.repetitions,
        "warmup": request.warmup,
    }
    told, prefills, decodes = Told(guest), list[Prefilled](), list[Decoded]()
    steps = request.repetitions * ((request.prompt_tokens > 0) + (request.gen_tokens > 0))
    with guest.visit(guest.job(max(request.prompt_tokens, request.gen_tokens, 8) + 8, speed=work)) as visit:
        guest.progress.start("browser", steps, "repetition")
        try:
            for message in visit.messages():
                told.take(message)
                if isinstance(message, Hello):
                    prefills, decodes = [], []
                elif isinstance(message, Prefilled):
                    prefills.append(message)
                    guest.progress.advance()
                elif isinstance(message, Decoded):
                    decodes.append(message)
                    guest.progress.advance()
        except TargetError as error:
            raise TargetError(f"{error.message}; {_so_far(request, prefills, decodes)}", error.hint) from error
        finally:
            guest.progress.finish()
    _check_counts(request, told, prefills, decodes)
    details = told.details()
    samples = SpeedSamples(
        tuple(p.prefill_s for p in prefills),
        tuple(p.ttft_s for p in prefills),
        tuple(d.token_s for d in decodes),
        told.loaded.load_s if told.loaded else 0.0,
        0,
        0,
        details,
    )
    metrics = summarize_speed(samples, request)
    for name in ("peak_rss_bytes", "idle_rss_bytes"):
        metrics[name] = Measurement.missing(name, "byte", _NO_MEMORY)
    name, version = runtime_version()
    return {
        "artifact": description,
        "target": target,
        "transport": "browser",
        "runtime": {"name": name, "version": version, "details": details},
        "settings": asdict(guest.settings) | asdict(request) | {"threads": details["threads"]},
        "metrics": {key: metric.as_dict() for key, metric in metrics.items()},
        "warnings": told.warnings(),
        "environment": told.environment(),
    }


def _so_far(request: SpeedRequest, prefills: Sequence[Prefilled], decodes: Sequence[Decoded]) -> str:
    said = []
    if prefills:
        values = ", ".join(f"{request.prompt_tokens / p.prefill_s:.2f}" for p in prefills)
        said.append(f"{len(prefills)} of {request.repetitions} prefills ({values} tok/s)")
    if decodes:
        values = ", ".join(f"{request.gen_tokens / max(sum(d.token_s), 1e-9):.2f}" for d in decodes)
        said.append(f"{len(decodes)} of {request.repetitions} generations ({values} tok/s)")
    return f"measured until then: {' and '.join(said)}" if said else "nothing was measured until then"


def _check_counts(request: SpeedRequest, told: Told, prefills: Sequence[Prefilled], decodes: Sequence[Decoded]) -> None:
    wanted = (request.repetitions * (request.prompt_tokens > 0), request.repetitions * (request.gen_tokens > 0))
    whole = all(len(d.token_s) == request.gen_tokens and sum(d.token_s) > 0 for d in decodes)
    if told.loaded is None or (len(prefills), len(decodes)) != wanted or not whole:
        raise TargetError(
            f"the page says that it is done after {len(prefills)} prefills and {len(decodes)} generations of "
            f"{request.gen_tokens} tokens; {wanted[0]} and {wanted[1]} were asked for",
            "is something between the page and this program? open the link anew",
        )


class BrowserSession:
    """See :class:`phi4edge.runtimes._api.Session`: every :meth:`logits` is a visit of its own."""

    def __init__(self, guest: Guest, context: int) -> None:
        self._guest, self._context = guest, context
        self.told = Told(guest)
        self.vanished = 0  # probabilities that float32 could not hold

    @property
    def vocab_size(self) -> int:
        """See :class:`phi4edge.runtimes._api.Session`."""
        return self._guest.vocab_size

    @property
    def details(self) -> Mapping[str, Any]:
        """See :class:`phi4edge.runtimes._api.Session`; known after the visit."""
        return self.told.details()

    @property
    def busy(self) -> int:
        """See :class:`phi4edge.runtimes._api.Session`: the browser's threads, where it may run on this machine."""
        loaded = self.told.loaded
        return loaded.threads if loaded is not None and self._guest.place.local else 0

    def logits(self, tokens: NDArray[np.int64], *, first: int = 0, progress: Progress = SILENT) -> Iterator[Logits]:
        """See :class:`phi4edge.runtimes._api.Session`; ln of the probabilities, which are logits but for a constant.

        Raises:
            MissingToolError: as :func:`measure_speed_in_browser`.
            TargetError: as there, or rows that are no distributions.
        """
        count, length = tokens.shape
        rows = length - first
        job = self._guest.job(self._context, drift={"chunks": tokens.tolist(), "first": first})
        with self._guest.visit(job) as visit:
            progress.start("browser", count * rows, "token")
            chunk, row, found = 0, 0, np.empty((rows, self.vocab_size), dtype=np.float32)
            try:
                for message in visit.messages():
                    self.told.take(message)
                    if isinstance(message, Hello) and (chunk, row) != (0, 0):
                        raise TargetError("the page was loaded anew midway", "open a new link, and leave it open")
                    if not isinstance(message, Row):
                        continue
                    if (message.chunk, message.position) != (chunk, first + row) or self.told.loaded is None:
                        raise TargetError(
                            f"the page sent position {message.position} of chunk {message.chunk}, where "
                            f"{first + row} of {chunk} was due"
                        )
                    found[row] = self._logarithms(message)
                    row += 1
                    progress.advance()
                    if row == rows:
                        yield found
                        chunk, row = chunk + 1, 0
            except TargetError as error:
                so_far = f"{chunk} of {count} chunks, and {row} positions of the next, were read until then"
                raise TargetError(f"{error.message}; {so_far}", error.hint) from error
            finally:
                progress.finish()
            if chunk != count:
                raise TargetError(f"the page says that it is done after {chunk} of {count} chunks")

    def _logarithms(self, row: Row) -> Logits:
        values = np.frombuffer(row.probabilities, dtype="<f4")
        total = float(values.sum(dtype=np.float64))
        if not np.isfinite(values).all() or values.min() < 0 or abs(total - 1) > _SUM:
            raise TargetError(
                f"chunk {row.chunk}, position {row.position}: the page sent no distribution (sum {total:g})",
                "where a logit is above 88, wllama's softmax overflows; or the artifact is damaged",
            )
        self.vanished += int((values < _LEAST).sum())
        logarithms: Logits = np.log(np.maximum(values, _LEAST))
        return logarithms

    def generate(self, tokens: list[int]) -> Iterator[int]:
        """Not in a browser."""
        raise UsageError("a browser does not write text here", "--greedy and --tasks measure on this machine")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to let go of: a visit ends with its chunks."""


def measure_drift_in_browser(
    guest: Guest, stores: Mapping[str, ReferenceStore], *, chunks: int | None = None, limits: Limits | None = None
) -> dict[str, Any]:
    """Compare the guest in the browser that opens its link with a reference; the ``data`` of a drift document.

    Raises:
        As :func:`phi4edge.measurement.drift_run.measure_on` and :meth:`BrowserSession.logits`.
    """
    sessions: list[BrowserSession] = []

    def opened(context: int, tokens: int) -> BrowserSession:
        sessions.append(BrowserSession(guest, context))
        return sessions[-1]

    host = Host(
        guest.artifact, *runtime_version(), opened, partial(describe, guest.artifact), dict, {"transport": "browser"}
    )
    data = measure_on(host, stores, chunks=chunks, limits=limits or (), progress=guest.progress)
    (session,) = sessions
    estimate = {
        "kind": "whole vocabulary",
        "detail": "from the float32 probabilities that wllama gives for every token at every scored position, each of "
        "which was decoded by itself",
        "left_out": f"{session.vanished} probabilities too small for float32 count as 1e-45",
        "vanished": session.vanished,
    }
    told = session.told
    return data | {
        "estimate": estimate,
        "warnings": told.warnings(),
        "environment": told.environment(),
    }
