"""A GGUF that is served to a browser, and what the browser tells beside its figures."""

from __future__ import annotations

__all__ = ["Announce", "Guest", "Told", "open_guest"]

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError, TargetError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.memory import format_bytes
from phi4edge.measurement.environment import environment
from phi4edge.runtimes._api import Settings
from phi4edge.transports._page_messages import Done, Hello, Loaded, Message, Status
from phi4edge.transports.browser import Piece, Place, Visit
from phi4edge.writers._gguf_cut import cut_gguf
from phi4edge.writers._gguf_file import MAGIC, GgufFile, read_gguf

Announce = Callable[[str, Sequence[str]], None]

_PIECE = 512 << 20  # bytes of one file that the page fetches
_MEMORY = 4 << 30  # what 32-bit addresses reach
_ROOM = 192 << 20  # of that, for wllama itself, its stack and llama.cpp's buffers
_KV_TYPES = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_BATCH = 512
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


class Told:
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
