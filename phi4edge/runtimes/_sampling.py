"""Text from a model's own distribution: several streams in lock step, each with a generator of its own.

A stream is fed exactly ``length`` tokens. It takes its prompts in turn: the tokens of a prompt are fed one by one,
what follows is sampled, and after an ending token the next prompt begins in an empty cache. All streams advance
together, one token a step, so that every step computes a batch of the same shape: the text of a stream depends on
the streams beside it only through that shape.
"""

from __future__ import annotations

__all__ = ["SampleRequest", "Stream", "Written", "nucleus"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LIKELY = 1024  # tokens in which the nucleus is looked for first


@dataclass(frozen=True)
class SampleRequest:
    """What is to be written."""

    prompts: Sequence[Sequence[Sequence[int]]]  # token ids of every stream's prompts, in the order of their use
    seeds: Sequence[Sequence[int]]  # of every stream's generator
    length: int  # tokens that are fed to every stream
    ends: Sequence[int]  # tokens after which the next prompt begins
    temperature: float = 1.0
    top_p: float = 0.95


@dataclass(frozen=True)
class Written:
    """A prompt and what the model went on with."""

    prompt: int  # which of the stream's prompts
    tokens: list[int]  # the prompt's among them; the ending token last, where one came
    ended: bool  # by an ending token; otherwise the stream was full


def nucleus(logits: NDArray[np.float32], temperature: float, top_p: float, uniform: float) -> int:
    """The token at quantile ``uniform`` of softmax(logits / temperature) within its nucleus.

    The nucleus is the smallest set of most likely tokens with a probability of at least ``top_p`` together
    (Holtzman et al. 2020); of tokens that are equally likely the smaller id comes first.
    """
    p = logits.astype(np.float64) / temperature
    p = np.exp(p - p.max())
    p /= p.sum()
    likely = min(_LIKELY, p.size)
    candidates = np.argpartition(p, p.size - likely)[p.size - likely :]
    if p[candidates].sum() < top_p:
        candidates = np.arange(p.size)
    candidates = candidates[np.lexsort((candidates, -p[candidates]))]
    mass = np.cumsum(p[candidates])
    size = min(int(np.searchsorted(mass, top_p)) + 1, mass.size)
    place = int(np.searchsorted(mass[:size], uniform * mass[size - 1], side="right"))
    return int(candidates[min(place, size - 1)])


class Stream:
    """One stream on its way: which token comes next, at which position, and what was written."""

    def __init__(self, prompts: Sequence[Sequence[int]], seed: Sequence[int], request: SampleRequest) -> None:
        self._prompts, self._request = prompts, request
        self._random = np.random.default_rng(list(seed))
        self._turn = 0
        self.written: list[Written] = []
        self._begin()

    def _begin(self) -> None:
        self._tokens = list(self._prompts[self._turn % len(self._prompts)])
        self.position = 0

    @property
    def token(self) -> int:
        """The token to feed, at ``position``."""
        return self._tokens[self.position]

    def take(self, logits: NDArray[np.float32]) -> bool:
        """Go on after ``token`` was fed; True where the cache of the stream is to be emptied."""
        self.position += 1
        if self.position < len(self._tokens):
            return False
        request = self._request
        token = nucleus(logits, request.temperature, request.top_p, self._random.random())
        self._tokens.append(token)
        if token not in request.ends:
            return False
        self._finish(ended=True)
        return True

    def close(self) -> None:
        """Keep what was fed of the text that is under way."""
        self._tokens = self._tokens[: self.position]
        if self._tokens:
            self._finish(ended=False)

    def _finish(self, *, ended: bool) -> None:
        self.written.append(Written(self._turn % len(self._prompts), self._tokens, ended))
        self._turn += 1
        self._begin()
