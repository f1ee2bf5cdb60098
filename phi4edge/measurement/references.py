"""What a measurement is held against: the store that was named, or one computed for a checkpoint and a text."""

from __future__ import annotations

__all__ = ["resolve_domains", "resolve_reference"]

from collections.abc import Sequence
from pathlib import Path

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.reference import ReferenceStore, build_store, is_store, open_store
from phi4edge.measurement.texts import named_texts, read_chunks, text_sha256
from phi4edge.model.tokenizer import load_tokenizer


def resolve_reference(
    reference: str,
    *,
    text: str | None,
    context: int | None = None,
    chunks: int | None = None,
    store: Path | None = None,
    top: int | None = None,
    progress: Progress = SILENT,
) -> ReferenceStore:
    """The store that ``reference`` is, or the store of the checkpoint that it names on ``text``.

    ``context`` None: 512, or what the store has. ``top``: as :func:`build_store`.
    A store that holds more chunks than asked serves with its first ones.

    Raises:
        UsageError: no text for a checkpoint, or --store beside a store.
        InputError: a bad model, text or store; or a store of another text, context or length.
        ResumeError: ``store`` holds something else.
    """
    if is_store(Path(reference)):
        if store is not None:
            raise UsageError(f"--reference {reference} is a store already", "leave --store out")
        if top is not None:
            raise UsageError(f"--reference {reference} is a store already, in an encoding of its own", "no --store-top")
        found = open_store(Path(reference))
        _check_store(found, text, context, chunks)
        return found
    if text is None:
        raise UsageError("a checkpoint as --reference needs a --text", "give a text file, or builtin:eval")
    checkpoint = open_checkpoint(reference)
    tokenizer = load_tokenizer(checkpoint.index.folder)
    tokenizer.check_vocabulary(checkpoint.config)
    cut = read_chunks(text, tokenizer, context=context or 512, chunks=chunks)
    limit = checkpoint.config.context_length
    if cut.tokens.shape[1] > limit:
        raise InputError(
            f"a context of {cut.tokens.shape[1]} exceeds the model's {limit}", f"at most --context {limit}"
        )
    return build_store(checkpoint, cut, store, progress, top)


def resolve_domains(
    reference: str,
    *,
    texts: Sequence[str],
    context: int | None = None,
    chunks: int | None = None,
    store: Path | None = None,
    top: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, ReferenceStore]:
    """A store for each of ``texts``, ``NAME=PATH`` or a path, by domain; ``store`` then holds a folder for each.

    Raises:
        UsageError: two texts of one name, or several beside a store.
        As :func:`resolve_reference`.
    """
    if len(texts) < 2:
        named = named_texts(texts)
        text = next(iter(named.values()), None)
        found = resolve_reference(
            reference, text=text, context=context, chunks=chunks, store=store, top=top, progress=progress
        )
        return {next(iter(named), found.header["text"]["name"]): found}
    if is_store(Path(reference)):
        raise UsageError(f"--reference {reference} is the store of one text", "give the checkpoint for several")
    return {
        domain: resolve_reference(
            reference,
            text=text,
            context=context,
            chunks=chunks,
            store=None if store is None else store / domain,
            top=top,
            progress=progress,
        )
        for domain, text in named_texts(texts).items()
    }


def _check_store(store: ReferenceStore, text: str | None, context: int | None, chunks: int | None) -> None:
    if context is not None and context != store.context:
        raise InputError(f"{store.path}: has chunks of {store.context} tokens, --context is {context}")
    if chunks is not None and chunks > store.chunks:
        raise InputError(f"{store.path}: has {store.chunks} chunks, --chunks is {chunks}", "compute a longer store")
    if text is not None:
        held = store.header["text"]
        if text_sha256(text, held["characters"]) != held["sha256"]:
            raise InputError(
                f"{store.path}: was made on the text {held['name']!r}, and {text} is another",
                "leave --text out to measure on the store's own text",
            )
