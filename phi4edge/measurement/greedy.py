"""Greedy divergence: after how many tokens the artifact would first write another token than full precision.

The full-precision model writes N tokens after each prompt, greedily, in float32. The artifact, in its runtime, reads
prompt and text in one forward, and at every position its most likely token is held against the text's. Up to the first
difference both models have written the same tokens, so this is where two free-running greedy texts part, up to the
rounding in which a runtime's reading differs from its writing; after it nothing is said. A tie counts as agreement.

    divergence   tokens that agree before the first that does not; N where all agree, which means "N or more"
    a text that ends, by an end-of-sequence token of the configuration, is looked at up to that token
    median, quantiles   over prompts; a value of N is a lower bound
    identical    share of prompts without any difference
    interval     95 %, percentiles of 2,000 bootstrap resamples of prompts (Efron 1979), seed 0
"""

from __future__ import annotations

__all__ = [
    "TOKENS",
    "GreedyTexts",
    "chunk_prompts",
    "greedy_divergence",
    "greedy_texts",
    "read_prompts",
    "summarize_greedy",
]

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi4edge.checkpoint.reader import CheckpointReader
from phi4edge.core.atomic import write_json
from phi4edge.core.errors import InputError
from phi4edge.core.events import SILENT, Progress
from phi4edge.core.hashing import sha256_json
from phi4edge.measurement.reference import ReferenceStore, cache_folder, fingerprint
from phi4edge.measurement.texts import TextTokenizer
from phi4edge.model.greedy import greedy_text
from phi4edge.runtimes._api import Session

TOKENS = 64
PROMPT_TOKENS = 32  # of a chunk
RESAMPLES, SEED = 2000, 0
_QUANTILES = (0.1, 0.25, 0.75, 0.9)


@dataclass(frozen=True)
class GreedyTexts:
    """What the full-precision model writes after each prompt."""

    source: str  # of the prompts
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[int, ...], ...]  # each as long as the others
    ends: frozenset[int]  # tokens that end a text


def read_prompts(path: Path, tokenizer: TextTokenizer) -> list[list[int]]:
    """Tokens of the prompts in a UTF-8 file, one a line, as they stand: no chat template is put around them.

    Raises:
        InputError: no such file, not UTF-8, or no prompt in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        hint = "--greedy takes a file of prompts, or chunks"
        raise InputError(f"{path}: cannot be read ({error.strerror})", hint) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}", "convert the file to UTF-8") from error
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    prompts = [[*start, *tokenizer.encode(line)] for line in lines if line]
    if not prompts:
        raise InputError(f"{path}: holds no prompt", "write one on each line")
    return prompts


def chunk_prompts(stores: Sequence[ReferenceStore], chunks: int | None) -> list[list[int]]:
    """The first tokens of every chunk that is measured."""
    return [row.tolist() for store in stores for row in store.tokens[:chunks, :PROMPT_TOKENS]]


def greedy_texts(
    checkpoint: CheckpointReader,
    prompts: Sequence[Sequence[int]],
    source: str,
    *,
    count: int = TOKENS,
    progress: Progress = SILENT,
) -> GreedyTexts:
    """What ``checkpoint`` writes after ``prompts``, taken from the cache where it was computed before.

    Raises:
        InputError: prompt and text are longer than the model's context.
    """
    config, longest = checkpoint.config, max(map(len, prompts)) + count
    if longest > config.context_length:
        raise InputError(
            f"the longest prompt and {count} tokens after it are {longest}, the model's context is "
            f"{config.context_length}",
            "shorten the prompt, or give fewer --greedy-tokens",
        )
    asked = [list(prompt) for prompt in prompts]
    key = sha256_json({"fingerprint": fingerprint(checkpoint.index), "prompts": asked, "count": count})
    place = cache_folder() / "greedy" / f"{key[:32]}.json"
    if place.is_file():
        texts = json.loads(place.read_text(encoding="utf-8"))
    else:
        progress.note(f"greedy text of the full-precision model: {count} tokens after {len(asked)} prompts")
        texts = greedy_text(checkpoint, asked, count, progress)
        write_json(place, texts)
    return GreedyTexts(source, tuple(map(tuple, asked)), tuple(map(tuple, texts)), frozenset(config.eos_token_ids))


def greedy_divergence(session: Session, given: GreedyTexts, progress: Progress = SILENT) -> list[int]:
    """Tokens that agree before the first that does not, for every prompt of ``given``."""
    found = [0] * len(given.prompts)
    for rows in _of_one_length(given):
        tokens = np.array([[*given.prompts[row], *given.texts[row][:-1]] for row in rows], dtype=np.int64)
        first = len(given.prompts[rows[0]]) - 1
        for row, logits in zip(rows, session.logits(tokens, first=first, progress=progress), strict=True):
            found[row] = _agreeing(logits, np.array(given.texts[row]), given.ends)
    return found


def _of_one_length(given: GreedyTexts) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(given.prompts):
        by_length.setdefault(len(prompt), []).append(row)
    yield from by_length.values()


def _agreeing(logits: NDArray[np.float32], text: NDArray[np.int64], ends: frozenset[int]) -> int:
    agrees = logits[np.arange(len(text)), text] == logits.max(axis=1)
    last = next((i + 1 for i, token in enumerate(text.tolist()) if token in ends), len(text))
    wrong = (~agrees[:last]).nonzero()[0]
    return int(wrong[0]) if wrong.size else len(text)


def summarize_greedy(divergence: Sequence[int], given: GreedyTexts) -> dict[str, Any]:
    """Median, quantiles and the share of identical texts, each with its interval."""
    values, count = np.array(divergence), len(given.texts[0])
    rng = np.random.default_rng(SEED)
    resampled = values[rng.integers(0, len(values), (RESAMPLES, len(values)))]
    identical = values >= count

    def interval(statistic: NDArray[np.float64]) -> list[float]:
        return [float(x) for x in np.quantile(statistic, (0.025, 0.975))]

    return {
        "prompts": len(values),
        "source": given.source,
        "tokens": count,
        "median": {
            "value": float(np.median(values)),
            "unit": "token",
            "n": len(values),
            "interval": interval(np.median(resampled, axis=1)),
            "at_least": bool(np.median(values) >= count),
        },
        "quantiles": {f"p{round(100 * q)}": float(np.quantile(values, q)) for q in _QUANTILES},
        "identical": {
            "value": float(identical.mean()),
            "unit": "fraction",
            "n": len(values),
            "interval": interval((resampled >= count).mean(axis=1)),
        },
        "divergence": [int(value) for value in values],
        "confidence": 0.95,
    }
