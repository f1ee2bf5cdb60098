"""From a text to the token chunks that drift is measured on, cut as llama-perplexity cuts them.

Chunks are ``context`` tokens long and do not overlap. Where the tokenizer adds a beginning-of-sequence token, it is
put before the text and takes the first place of every chunk. The rest of a text that fills no chunk is not used.
"""

from __future__ import annotations

__all__ = ["Chunks", "TextTokenizer", "named_texts", "read_chunks", "text_sha256"]

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phi4edge.calibration.corpus import load_texts
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.hashing import sha256_bytes

CORPUS_CHUNKS = 32  # of a corpus, where no number is asked for; a file is used whole
LEAST_CONTEXT = 8
_CHARACTERS_PER_TOKEN = 8  # of a corpus are read at first; more where they turn out too few
_SEPARATOR = "\n\n"  # between the documents of a corpus
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")


class TextTokenizer(Protocol):
    """What of a tokenizer this module uses."""

    @property
    def add_bos(self) -> bool: ...

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Chunks:
    """Tokens to measure on, and the text that they are."""

    name: str  # of the file, or of the corpus
    sha256: str  # of the text, UTF-8
    characters: int  # how much of a corpus was read; the length of a file
    tokens: NDArray[np.int64]  # [chunks, context]


class _Source:
    """A plain text file, or documents of a corpus read as far as needed."""

    def __init__(self, spec: str) -> None:
        path = Path(spec)
        self.is_file = path.is_file() and path.suffix not in (".jsonl", ".ndjson", ".toml")
        self.name = path.name if path.exists() else spec
        self._documents = iter(()) if self.is_file else load_texts(spec)
        self._text = _read(path) if self.is_file else ""
        self.exhausted = self.is_file

    def text(self, characters: int | None) -> str:
        """The first ``characters`` of the text, or what there is; a file is always whole."""
        if self.is_file:
            return self._text
        while not self.exhausted and (characters is None or len(self._text) < characters):
            batch = list(islice(self._documents, 64))
            self.exhausted = not batch
            self._text += "".join(document + _SEPARATOR for document in batch)
        return self._text[:characters]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}", "convert the file to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def named_texts(specs: Sequence[str]) -> dict[str, str]:
    """Texts by domain, from ``NAME=PATH`` or a path alone, whose name is then the domain's.

    A path that exists is a path, whatever it has in its name.

    Raises:
        UsageError: two texts of one name.
    """
    found: dict[str, str] = {}
    for spec in specs:
        match = None if Path(spec).exists() else _NAMED.fullmatch(spec)
        name, path = match.groups() if match else (Path(spec).stem or spec, spec)
        if name in found:
            raise UsageError(f"--text: two texts are named {name!r}", "tell them apart: --text NAME=PATH")
        found[name] = path
    return found


def text_sha256(spec: str, characters: int) -> str:
    """SHA-256 of text ``spec`` as far as a measurement that read ``characters`` of it saw it.

    Raises:
        InputError: no such text.
    """
    return sha256_bytes(_Source(spec).text(characters).encode())


def read_chunks(spec: str, tokenizer: TextTokenizer, *, context: int = 512, chunks: int | None = None) -> Chunks:
    """Tokenize text ``spec`` (a file, or a corpus such as ``builtin:eval``) and cut it.

    ``chunks`` None: the whole of a file, CORPUS_CHUNKS of a corpus.

    Raises:
        UsageError: an impossible context or number of chunks.
        InputError: no such text, an empty one, or one shorter than asked.
    """
    if context < LEAST_CONTEXT:
        raise UsageError(f"context {context} is too short to score its second half", f"at least {LEAST_CONTEXT}")
    if chunks is not None and chunks < 1:
        raise UsageError(f"chunks {chunks} is not positive")
    source = _Source(spec)
    wanted = chunks or (1 if source.is_file else CORPUS_CHUNKS)
    characters = wanted * context * _CHARACTERS_PER_TOKEN
    while True:
        text = source.text(characters)
        if not text.strip():
            raise InputError(f"{spec}: the text is empty")
        tokens = tokenizer.encode(text)
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
        if len(tokens) >= wanted * context or source.exhausted:
            break
        characters *= 2
    full = len(tokens) // context
    if len(tokens) < wanted * context:
        raise InputError(
            f"{spec}: the text has {len(tokens)} tokens, but {wanted} chunk(s) of {context} need {wanted * context}",
            f"give --chunks {full} or a longer text" if full else "give a longer text, or a shorter --context",
        )
    count = full if chunks is None and source.is_file else wanted
    cut = np.array(tokens[: count * context], dtype=np.int64).reshape(count, context)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        cut[:, 0] = tokenizer.bos_id
    return Chunks(source.name, sha256_bytes(text.encode()), len(text), cut)
