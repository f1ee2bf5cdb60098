"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json does: GGUF's ``tokenizer.ggml.pre``.

llama.cpp has the split patterns compiled in and a GGUF names one; its own converter recognises a tokenizer by a hash
over the ids of a test string, which a shared vocabulary alone can match. Here the structure itself is compared, so
the vocabulary does not matter, and an unknown structure is an error: with a wrong name the model sees other tokens
than it was trained on, and nothing says so.

``gpt-4o`` in llama.cpp is an approximation of the o200k pattern: it knows no combining marks and takes for upper case
only A–Z, so words of other scripts are split a little differently there than by the tokenizer itself.
"""

from __future__ import annotations

__all__ = ["gguf_pre_tokenizer"]

from collections.abc import Mapping
from typing import Any

from phi4edge.core.errors import InputError

# Equivalent spellings of one alternative, the first is the canonical one.
_CONTRACTIONS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    "'(?i:[sdmt]|ll|ve|re)",
    "(?i:'[sdmt]|'ll|'ve|'re)",
)
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERNS = {
    # tiktoken's cl100k, which Phi-4 has; llama.cpp's name for it without a vocabulary of its own is "dbrx".
    rf"{_CONTRACTIONS[0]}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}": "dbrx",
    # tiktoken's o200k, which Phi-4-mini has.
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS[0]}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS[0]}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}": "gpt-4o",
}
_HINT = "known: the cl100k pattern (Phi-4), the o200k pattern (Phi-4-mini), digits one by one (SmolLM2)"


def gguf_pre_tokenizer(tokenizer: Mapping[str, Any], where: str) -> str:
    """The name of llama.cpp's pre-tokenizer for the JSON object of a tokenizer.json.

    Raises:
        InputError: llama.cpp has none that is known to be the same.
    """
    if tokenizer.get("normalizer") is not None:
        kind = tokenizer["normalizer"].get("type")
        raise InputError(f"{where}: normalizer {kind} has no place in a GGUF of this family", "the family has none")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    found = " + ".join(str(step.get("type")) for step in steps) or "none"
    if len(steps) != 2 or steps[1].get("type") != "ByteLevel" or steps[1].get("add_prefix_space"):
        raise InputError(f"{where}: pre-tokenizer ({found}) is not one that llama.cpp is known to have", _HINT)
    first, splits_again = steps[0], bool(steps[1].get("use_regex", True))
    if first.get("type") == "Digits" and first.get("individual_digits") and splits_again:
        return "smollm"
    if first.get("type") == "Split" and _keeps_matches(first) and not splits_again:
        pattern = first.get("pattern", {}).get("Regex", "")
        name = _PATTERNS.get(_canonical(pattern))
        if name is not None:
            return name
        raise InputError(f"{where}: split pattern {pattern!r} is not one that llama.cpp is known to have", _HINT)
    raise InputError(f"{where}: pre-tokenizer ({found}) is not one that llama.cpp is known to have", _HINT)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return list(pre_tokenizer.get("pretokenizers", []))
    return [pre_tokenizer]


def _keeps_matches(split: Mapping[str, Any]) -> bool:
    """Every match becomes a piece. The known patterns match all of any text, so what is between does not arise."""
    return (split.get("behavior"), bool(split.get("invert"))) in {("Isolated", False), ("Removed", True)}


def _canonical(pattern: str) -> str:
    for spelling in _CONTRACTIONS[1:]:
        pattern = pattern.replace(spelling, _CONTRACTIONS[0])
    return pattern
