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

__all__ = ["BrowserSession", "Guest", "measure_drift_in_browser", "measure_speed_in_browser", "open_guest"]

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.memory import format_bytes
from phi4edge.measurement.artifact import describe
from phi4edge.measurement.drift_run import Elsewhere, measure_domains
from phi4edge.measurement.environment import environment
from phi4edge.measurement.gates import Limits
from phi4edge.measurement.reference import ReferenceStore
from phi4edge.measurement.result import Measurement
from phi4edge.measurement.speed import summarize_speed
from phi4edge.runtimes._api import Logits, Settings, SpeedRequest, SpeedSamples
from phi4edge.runtimes._serving import random_tokens
from phi4edge.transports._page_messages import Decoded, Done, Hello, Loaded, Message, Prefilled, Row, Status
from phi4edge.transports.browser import Piece, Place, Visit, runtime_version
from phi4edge.writers._gguf_cut import cut_gguf
from phi4edge.writers._gguf_file import MAGIC, GgufFile, read_gguf

Announce = Callable[[str, Sequence[str]], None]

_PIECE = 512 << 20  # bytes of one file that the page fetches
_MEMORY = 4 << 30  # what 32-bit addresses reach
_ROOM = 192 << 20  # of that, for wllama itself, its stack and llama.cpp's buffers
_KV_TYPES = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_BATCH = 512
_LEAST = np.float32(1e-45)  # below every probability that float32 holds
_SUM = 1e-3  # by how much probabilities may miss 1: wllama adds them up in float32
_NO_MEMORY = "a browser tells no page what memory it takes"
_ONE_THREAD = (
    "one thread computed, {asked}: the page was not cross-origin isolated, as over plain http; "
    "the speed is not what this device can do. Serve it with --tls"
)


@dataclass(frozen=True)
class Guest:
    """A GGUF that is ready to be served, and how."""

    artifact: Path
    file: GgufFile
    pieces: tuple[Piece, ...]
    place: Place
    settings: Settings
    announce: Announce
    progress: Progress = SILENT

    @property
    def vocab_size(self) -> int:
        """Logits a position."""
        return self.file.tensors["token_embd.weight"].shape[0]

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return int(self.file.metadata[f"{self.file.metadata['general.architecture']}.block_count"])

    def job(self, context: int, **work: Any) -> dict[str, Any]:
        """What the page is asked: ``work`` in a context of ``context`` tokens."""
        settings = self.settings
        return {
            "name": self.artifact.resolve().name,
            "settings": {
                "threads": settings.threads,
                "context": context,
                "batch": _BATCH,
                "kv_type": settings.kv_type,
                "flash_attention": settings.flash_attention == "auto",
            },
            "speed": None,
            "drift": None,
        } | work

    def visit(self, job: Mapping[str, Any]) -> Visit:
        """Serve ``job``."""
        return Visit(self.place, self.pieces, job, self.vocab_size, self.announce)


def open_guest(
    artifact: Path, settings: Settings, place: Place, announce: Announce, progress: Progress = SILENT
) -> Guest:
    """Check that ``artifact`` can run in a browser with ``settings``; nothing is served yet.

    Raises:
        InputError: not a GGUF, or a damaged one.
        UsageError: settings that wllama does not know, or a file of several that is 2 GiB or larger.
        TargetError: larger than what WebAssembly can hold.
    """
    if not artifact.exists():
        raise InputError(f"{artifact}: no such file or folder")
    if artifact.is_dir() or not _is_gguf(artifact):
        raise InputError(
            f"{artifact}: a browser runs a GGUF, and this is none", "phi4edge export RUN --format gguf --out FILE.gguf"
        )
    if settings.kv_type not in _KV_TYPES:
        raise UsageError(f"--kv {settings.kv_type} is unknown to wllama", f"one of {', '.join(_KV_TYPES)}")
    if settings.flash_attention == "on":
        raise UsageError("--flash-attention on cannot be forced in a browser", "auto, or off")
    if settings.activations != "none":
        raise UsageError("--activations rounds in torch_ref, not in a browser", "leave it out")
    file = read_gguf(artifact)
    total = sum(path.stat().st_size for path in file.files)
    if total + _ROOM > _MEMORY:
        raise TargetError(
            f"{artifact}: {format_bytes(total)} do not fit WebAssembly's {format_bytes(_MEMORY)}, of which "
            f"{format_bytes(_ROOM)} are wllama's own",
            "export a smaller one: fewer bits, or Phi-4-mini",
        )
    pieces = tuple(Piece(p.header, p.path, p.offset, p.nbytes) for p in cut_gguf(file, _PIECE))
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{artifact}: has no token_embd.weight", "a language model's GGUF has one")
    return Guest(artifact, file, pieces, place, settings, announce, progress)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


class _Told:
    """What the visitor said beside its figures, held against what it was asked."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.facts: Mapping[str, Any] = {}
        self.loaded: Loaded | None = None
        self.hidden = 0
        self._stage = ""

    def take(self, message: Message) -> None:
        """Note ``message``, and show progress.

        Raises:
            TargetError: the page has loaded something else.
        """
        if isinstance(message, Hello):
            self.facts, self.loaded = message.facts, None
            self.guest.progress.note(f"opened by {message.facts.get('user_agent', 'a browser that does not say what')}")
        elif isinstance(message, Status):
            self.guest.progress.status(message.text)
        elif isinstance(message, Loaded):
            self._check(message)
            self.loaded = message
        elif isinstance(message, Done):
            self.hidden = message.hidden

    def _check(self, loaded: Loaded) -> None:
        sizes = sum(piece.size for piece in self.guest.pieces)
        found = (loaded.transferred, loaded.info.get("vocab_size"), loaded.info.get("layers"))
        expected = (sizes, self.guest.vocab_size, self.guest.layers)
        if found != expected:
            raise TargetError(
                f"the page loaded another model: {found} bytes, tokens and blocks; the artifact has {expected}",
                "open the link anew",
            )

    def details(self) -> dict[str, Any]:
        """Of the runtime, as it was set up."""
        loaded = self.loaded
        assert loaded is not None
        log = "\n".join(loaded.log)
        flash = re.search(r"Flash Attention was auto, set to (enabled|disabled)", log)
        said = {"enabled": "on", "disabled": "off"}.get(flash[1] if flash else "", self.guest.settings.flash_attention)
        return {
            **loaded.info,
            "threads": loaded.threads,
            "kv_type": self.guest.settings.kv_type,
            "flash_attention": said,
            "transfer_s": loaded.transfer_s,
            "transfer_bytes": loaded.transferred,
            "wasm_build": "multi-thread" if loaded.threads > 1 else "single-thread",
            "clock_step_s": self.facts.get("clock_step_s"),
            "cross_origin_isolated": self.facts.get("cross_origin_isolated"),
        }

    def environment(self) -> dict[str, Any]:
        """The device as its browser describes it, in the place of a fingerprint that nobody can take there."""
        return {
            "cpu": {
                "model": f"{self.facts.get('model') or self.facts.get('platform') or 'unknown'}, as its browser says",
                "architecture": self.facts.get("architecture"),
                "logical_cores": self.facts.get("hardware_concurrency"),
            },
            "browser": dict(self.facts),
            "versions": environment()["versions"],
        }

    def warnings(self) -> list[str]:
        """What a reader must know before the figures."""
        found, loaded = [], self.loaded
        assert loaded is not None
        asked = loaded.info.get("threads_asked")
        if loaded.threads == 1 and asked != 1:
            found.append(_ONE_THREAD.format(asked=f"{asked} were asked for"))
        elif loaded.threads == 1:
            found.append("one thread computed; --threads asks for more")
        if self.hidden:
            found.append(f"the page was in the background {self.hidden} times, where browsers slow it down")
        return found


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
    told, prefills, decodes = _Told(guest), list[Prefilled](), list[Decoded]()
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


def _check_counts(
    request: SpeedRequest, told: _Told, prefills: Sequence[Prefilled], decodes: Sequence[Decoded]
) -> None:
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
        self.told = _Told(guest)
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
        As :func:`phi4edge.measurement.drift_run.measure_domains` and :meth:`BrowserSession.logits`.
    """
    sessions: list[BrowserSession] = []

    def opened(context: int) -> BrowserSession:
        sessions.append(BrowserSession(guest, context))
        return sessions[-1]

    data = measure_domains(
        guest.artifact,
        stores,
        chunks=chunks,
        settings=guest.settings,
        limits=limits or (),
        elsewhere=Elsewhere(*runtime_version(), opened),
        progress=guest.progress,
    )
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
        "transport": "browser",
        "estimate": estimate,
        "warnings": told.warnings(),
        "environment": told.environment(),
    }
