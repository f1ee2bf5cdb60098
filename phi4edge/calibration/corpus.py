"""From a corpus name or path to token chunks: what calibration runs through the model.

A corpus is a recipe of parts with shares (``calibration/*.toml``), a text file, or a JSONL file. Samples are
chunks of equal length, cut from the documents in an order that the seed decides; a sample is of one domain. Samples
to be kept aside come last, and every domain has its share of them. A ``.safetensors`` file has chunks that are ready;
in a mix or a recipe its share is made of the first of them.
"""

from __future__ import annotations

__all__ = ["Corpus", "load_corpus", "load_texts", "look_into", "whole_samples"]

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from phi4edge.calibration.chunks import SUFFIX, read_chunks
from phi4edge.calibration.parts import Part, documents, read_parts
from phi4edge.calibration.sources import Document
from phi4edge.core.errors import InputError, UsageError

Chunk = tuple[str, list[int]]  # domain, token ids


class ChatTokenizer(Protocol):
    """What of a tokenizer this module uses."""

    @property
    def add_bos(self) -> bool: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str: ...


@dataclass(frozen=True)
class Corpus:
    """Token chunks and where they come from."""

    name: str
    sha256: str  # of the chunks' token ids, before any are put last
    tokens: Tensor  # [samples, length] int64
    domains: tuple[str, ...]  # of every sample
    held_out: int = 0  # the last samples, kept aside: every domain has its share of them

    def domain_counts(self) -> dict[str, dict[str, int]]:
        """Samples of every domain, and how many of them are kept aside."""
        aside = Counter(self.domains[len(self.domains) - self.held_out :])
        return {d: {"samples": n, "held_out": aside[d]} for d, n in sorted(Counter(self.domains).items())}


def load_texts(spec: str) -> Iterator[str]:
    """Plain texts of a corpus for evaluation: a file's in its order, a recipe's parts mixed by their shares."""
    parts = read_parts(spec, False)
    if len(parts) == 1:
        yield from (document.text or _plain(document) for document in documents(parts[0]))
        return
    streams = [(part.share, iter(_shuffled(list(documents(part)), seed=0))) for part in parts]
    sent = [0.0] * len(streams)  # characters of each, over its share
    alive = set(range(len(streams)))
    while alive:
        turn = min(alive, key=lambda i: (sent[i], i))
        document = next(streams[turn][1], None)
        if document is None:
            alive.discard(turn)
            continue
        text = document.text or _plain(document)
        sent[turn] += len(text) / streams[turn][0]
        yield text


def _plain(document: Document) -> str:
    return "".join(f"{message['content']}\n" for message in document.messages)


def _shuffled(documents: list[Document], seed: int) -> list[Document]:
    random.Random(seed).shuffle(documents)
    return documents


def _allot(total: int, shares: list[float]) -> list[int]:
    """Split ``total`` by ``shares``: largest remainders get what whole numbers leave over."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def load_corpus(
    spec: str,
    tokenizer: ChatTokenizer,
    *,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    chat: bool | None = None,
    held_out: int = 0,
    sampled: Path | None = None,
) -> Corpus:
    """Tokenize corpus ``spec`` into ``samples`` chunks of ``sequence_length`` tokens.

    ``chat`` true or false overrides what the recipe says of its parts; None leaves it to the recipe. ``held_out``
    samples are put last, chosen so that what is kept and what is held out are mixed alike. ``sampled`` is the file of
    the model's own text, where the corpus asks for it.

    Raises:
        InputError: the corpus is empty, or shorter than asked.
    """
    if samples < 1 or sequence_length < 2:
        raise UsageError(f"samples {samples} × sequence_length {sequence_length} is no corpus")
    if spec.endswith(SUFFIX):
        vocabulary = tokenizer.vocab_size
        ready = read_chunks(Path(spec), samples=samples, sequence_length=sequence_length, vocab_size=vocabulary)
        return _corpus(spec, ready, held_out)
    parts = read_parts(spec, chat, sampled)
    counts = _allot(samples, [part.share for part in parts])
    pools = [_chunks(part, tokenizer, count, sequence_length, seed) for part, count in zip(parts, counts, strict=True)]
    missing = samples - sum(map(len, pools))
    for i, part in enumerate(parts):
        # A part that is all used up leaves its share to those that have more.
        if missing > 0 and len(pools[i]) == counts[i]:
            pools[i] = _chunks(part, tokenizer, counts[i] + missing, sequence_length, seed)
            missing = samples - sum(map(len, pools))
    if missing > 0:
        have = samples - missing
        raise InputError(
            f"corpus {spec} has {have * sequence_length} tokens in whole samples, "
            f"but {samples} samples of {sequence_length} need {samples * sequence_length}"
            if have
            else f"corpus {spec} is empty or shorter than one sample of {sequence_length} tokens",
            f"give more text, or at most {have} samples" if have else "give more text",
        )
    chunks = [chunk for pool in pools for chunk in pool]
    random.Random(seed).shuffle(chunks)
    return _corpus(spec, chunks, held_out)


def _corpus(spec: str, chunks: list[Chunk], held_out: int) -> Corpus:
    digest = hashlib.sha256(_tensor(chunks).numpy().tobytes()).hexdigest()
    chunks = _put_last(chunks, held_out)
    return Corpus(spec, digest, _tensor(chunks), tuple(domain for domain, _ in chunks), held_out)


def _tensor(chunks: list[Chunk]) -> Tensor:
    return torch.tensor([ids for _, ids in chunks], dtype=torch.int64)


def _put_last(chunks: list[Chunk], count: int) -> list[Chunk]:
    """The same chunks, ``count`` of them moved to the end: of every domain the last ones, as many as is its share.

    Seats are given one at a time. Every domain with at least two samples gets one first, where there are enough;
    each further one goes to the domain that is furthest below its share and keeps a sample.
    """
    assert 0 <= count < len(chunks)
    have = Counter(domain for domain, _ in chunks)
    several = [domain for domain in have if have[domain] > 1]
    seats = Counter(several if count >= len(several) else [])
    while seats.total() < count:
        open_to = [d for d in have if have[d] - seats[d] > 1] or [d for d in have if have[d] > seats[d]]
        seats[max(open_to, key=lambda d: have[d] * count / len(chunks) - seats[d])] += 1
    left = have - seats  # how many of each still stay in front
    front: list[Chunk] = []
    back: list[Chunk] = []
    for chunk in chunks:
        (front if left[chunk[0]] > 0 else back).append(chunk)
        left[chunk[0]] -= 1
    return front + back


def _chunks(part: Part, tokenizer: ChatTokenizer, count: int, length: int, seed: int) -> list[Chunk]:
    """At most ``count`` samples of a part; fewer where its text ends."""
    if count and part.path is not None and part.path.suffix == SUFFIX:
        return read_chunks(part.path, samples=None, sequence_length=length, vocab_size=tokenizer.vocab_size)[:count]
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    body = length - len(head)
    chunks: list[Chunk] = []
    streams: dict[str, list[int]] = {}  # what is not yet cut, by domain
    for document in _shuffled(list(documents(part)), seed) if count else ():
        domain = document.domain or part.domain
        stream = streams.setdefault(domain, [])
        stream += tokenizer.encode(_render(document, part.chat, tokenizer))
        whole = len(stream) // body
        chunks += [(domain, head + stream[i * body : (i + 1) * body]) for i in range(whole)]
        del stream[: whole * body]
        if len(chunks) >= count:
            break
    return chunks[:count]


def look_into(part: Part, tokenizer: ChatTokenizer, sequence_length: int) -> None:
    """Begin to read a part.

    Raises:
        InputError: its file is missing, damaged or of another layout.
    """
    if part.path is not None and part.path.suffix == SUFFIX:
        _chunks(part, tokenizer, 1, sequence_length, 0)
    else:
        next(documents(part), None)


def whole_samples(path: Path, tokenizer: ChatTokenizer, sequence_length: int) -> int:
    """How many samples of ``sequence_length`` tokens the file at ``path`` gives, each domain cut on its own."""
    return len(_chunks(Part("file", path, 1.0, chat=False, domain=""), tokenizer, sys.maxsize, sequence_length, 0))


def _render(document: Document, chat: bool, tokenizer: ChatTokenizer) -> str:
    if document.messages and (chat or not document.text):
        return tokenizer.apply_chat_template(list(document.messages))
    if chat:
        return tokenizer.apply_chat_template([{"role": "user", "content": document.text}], add_generation_prompt=True)
    return document.text
