"""A runtime as a model that answers: texts to tokens and back, greedy answers up to a stop string, likelihoods."""

from __future__ import annotations

__all__ = ["Answering", "AskedModel", "DoesNotFitError", "until_stop"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from phi4edge.core.errors import InputError
from phi4edge.core.events import SILENT, Progress
from phi4edge.measurement.tasks.answers import AnswerStore
from phi4edge.model.tokenizer import Tokenizer
from phi4edge.runtimes._api import Session

_ENDS = ("<|endoftext|>", "<|end|>", "<|im_end|>", "<|eot_id|>")


_SHORTER = "give a larger --task-context, if the model has it, or fewer --shots"


class DoesNotFitError(InputError):
    """A prompt is longer than the context; nothing is ever cut off it."""

    def __init__(self, place: int, message: str) -> None:
        super().__init__(message, _SHORTER)
        self.place = place  # of the prompt among those that were given


class Answering(Protocol):
    """What the harness asks a model for; a test's scripted model has it too."""

    def chat(self, messages: Sequence[dict[str, Any]], *, generation: bool) -> str:
        """``messages`` in the model's chat template."""
        ...

    def write(self, prompts: Sequence[str], stop: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers."""
        ...

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of every (context, continuation): ln P(continuation | context), and whether it is the greedy one."""
        ...


def until_stop(
    tokens: Iterable[int], decode: Callable[[list[int]], str], ends: Iterable[int], stop: Sequence[str]
) -> tuple[str, int]:
    """The text of ``tokens`` up to the first of ``ends`` or of the strings ``stop``, and how many tokens were taken."""
    kept: list[int] = []
    text, ends = "", set(ends)
    for token in tokens:
        if token in ends:
            break
        kept.append(token)
        text = decode(kept)
        places = [place for word in stop if (place := text.find(word)) >= 0]
        if places:
            return text[: min(places)], len(kept)
    return text, len(kept)


class AskedModel:
    """A model in a runtime, opened when the first answer that is not kept is needed; use as a context manager."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        tokenizer: Tokenizer,
        store: AnswerStore,
        context: int,
        title: str,
        progress: Progress = SILENT,
    ) -> None:
        self._open, self._tokenizer, self._store = open_session, tokenizer, store
        self._context, self._title, self._progress = context, title, progress
        self._session: Session | None = None
        self._about: dict[str, Any] = {}
        self.ended_by_context = 0  # answers that had less room than they were allowed, and used it up
        named = [tokenizer.ids[word] for word in _ENDS if word in tokenizer.ids]
        self._ends = sorted({*named, *(i for i in (tokenizer.eos_id, tokenizer.eot_id) if i is not None)})

    def about(self, shots: Mapping[str, Any]) -> Self:
        """This model, for questions behind the worked examples ``shots``; answers are kept under them too."""
        self._about = {"shots": dict(shots)} if shots else {}
        return self

    def chat(self, messages: Sequence[dict[str, Any]], *, generation: bool) -> str:
        """See :class:`Answering`.

        Raises:
            InputError: the model has no chat template.
        """
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=generation)

    def write(self, prompts: Sequence[str], stop: Sequence[str], max_tokens: int) -> list[str]:
        """See :class:`Answering`; an answer also ends at an ending token, and where the context is full.

        Raises:
            DoesNotFitError: a prompt that leaves no room for an answer; nothing was asked then.
            TargetError, MissingToolError: the runtime.
        """
        answers, read = [], [self._tokens(prompt) for prompt in prompts]
        for place, tokens in enumerate(read):
            if len(tokens) >= self._context:
                raise DoesNotFitError(
                    place, f"{len(tokens)} tokens of a prompt leave no room in a context of {self._context}"
                )
        self._progress.start(self._title, len(prompts), "answer")
        for tokens in read:
            count = min(max_tokens, self._context - len(tokens))
            request = {"tokens": tokens, "stop": list(stop), "ends": self._ends, "count": count} | self._about
            kept = self._store.find(request)
            if kept is None:
                taken = islice(self._running().generate(tokens), count)
                text, length = until_stop(taken, self._tokenizer.decode, self._ends, stop)
                kept = {"text": text, "tokens": length}
                self._store.keep(request, kept)
            self.ended_by_context += kept["tokens"] == count < max_tokens
            answers.append(str(kept["text"]))
            self._progress.advance()
        self._progress.finish()
        return answers

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """See :class:`Answering`; spaces at the end of a context are counted to the continuation.

        Raises:
            DoesNotFitError: a pair that does not fit the context.
            InputError: a continuation of no token.
            TargetError, MissingToolError: the runtime.
        """
        found = []
        self._progress.start(self._title, len(pairs), "choice")
        for place, (context, continuation) in enumerate(pairs):
            before, tokens = self._tokens(context.rstrip()), self._tokens(context + continuation)
            first = len(before) or 1  # of the tokens that are weighed; the very first one has nothing before it
            if len(tokens) > self._context:
                raise DoesNotFitError(
                    place, f"{len(tokens)} tokens, {len(before)} of them the prompt's, in a context of {self._context}"
                )
            if first >= len(tokens):
                raise InputError(f"a choice of no token: {continuation[:60]!r}", "choices are texts that add something")
            request = {"tokens": tokens, "first": first} | self._about
            kept = self._store.find(request)
            if kept is None:
                row = np.array([tokens[:-1]], dtype=np.int64)
                (logits,) = self._running().logits(row, first=first - 1)
                kept = _weights(logits, tokens[first:])
                self._store.keep(request, kept)
            found.append((float(kept["log_likelihood"]), bool(kept["greedy"])))
            self._progress.advance()
        self._progress.finish()
        return found

    def _tokens(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        bos = self._tokenizer.bos_id
        return [bos, *ids] if self._tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _running(self) -> Session:
        if self._session is None:
            self._session = self._open()
        return self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._session.__exit__(kind, error, trace)


def _weights(logits: Any, following: list[int]) -> dict[str, Any]:
    """ln P of ``following`` [n] under ``logits`` [n, vocab] float32, in float64."""
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise InputError("logits are NaN or infinite", "the artifact is damaged")
    top = x.max(axis=1)
    log_sum = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    chosen = x[np.arange(len(following)), following]
    return {
        "log_likelihood": float((chosen - log_sum).sum()),
        "greedy": bool((x.argmax(axis=1) == np.array(following)).all()),
    }
