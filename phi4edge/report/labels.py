"""What artifacts are called in a report: their name, a short form for plots, unique either way."""

from __future__ import annotations

__all__ = ["Labels", "find_baseline", "label_artifacts", "readable", "shorten"]

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from phi4edge.core.errors import UsageError, closest
from phi4edge.report.documents import Artifact

_LONGEST = 28  # characters of a short label


@dataclass(frozen=True)
class Labels:
    """By sha256, in the order in which the artifacts were met."""

    artifacts: dict[str, Artifact]
    full: dict[str, str]
    short: dict[str, str]
    notes: tuple[str, ...]


def label_artifacts(artifacts: Iterable[Artifact]) -> Labels:
    """Join artifacts by sha256: the first result names it, later ones fill in what it lacked."""
    joined: dict[str, Artifact] = {}
    notes: list[str] = []
    for artifact in artifacts:
        known = joined.setdefault(artifact.sha256, artifact)
        if known.name != artifact.name:
            note = f"{known.name} and {artifact.name} are the same bytes; they stand as {known.name}."
            notes += [note] if note not in notes else []
        best = min(known, artifact, key=lambda a: (a.bits_per_weight is None, a.bits_of_linears))
        joined[artifact.sha256] = replace(
            known,
            format=known.format or artifact.format,
            scheme=known.scheme or artifact.scheme,
            bytes=known.bytes or artifact.bytes,
            bits_per_weight=best.bits_per_weight,
            bits_of_linears=best.bits_of_linears,
        )
    names = [readable(artifact.name) for artifact in joined.values()]
    short = shorten(names)

    def unique(texts: Sequence[str]) -> dict[str, str]:
        return {
            sha: f"{text} [{sha[:8]}]" if names.count(name) > 1 else text
            for sha, name, text in zip(joined, names, texts, strict=True)
        }

    return Labels(joined, unique(names), unique(short), tuple(notes))


def find_baseline(name: str, labels: Labels) -> str:
    """sha256 of the artifact that ``name`` (its name, with or without suffix, or short label) means.

    Raises:
        UsageError: no such artifact, or several.
    """
    matches = [
        sha
        for sha, artifact in labels.artifacts.items()
        if name in (labels.full[sha], labels.short[sha], artifact.name, artifact.name.rsplit(".", 1)[0])
        or (len(name) >= 8 and sha.startswith(name))
    ]
    if len(matches) == 1:
        return matches[0]
    known = list(labels.full.values())
    if matches:
        same = ", ".join(labels.full[sha] for sha in matches)
        raise UsageError(f"--baseline {name!r} means {len(matches)} artifacts: {same}", "give one of these names")
    near = closest(name, known)
    hint = f"did you mean {near!r}? " if near else ""
    raise UsageError(f"--baseline: no artifact is called {name!r}", f"{hint}artifacts: {', '.join(known)}")


def readable(name: str) -> str:
    """``name`` with what cannot be printed shown as a replacement character."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def shorten(names: Sequence[str]) -> list[str]:
    """Names without the beginning (up to a separator) and the suffix that all share; long ones lose their middle.

    ``["phi-q4_0-gptq.gguf", "phi-q8_0.gguf"]`` gives ``["q4_0-gptq", "q8_0"]``.
    """
    different = list(dict.fromkeys(names))
    stems = {name: re.sub(r"\.(gguf|safetensors|onnx)$", "", name) for name in different}
    if len(different) > 1:
        shared = _common_prefix(list(stems.values()))
        cut = max((shared.rfind(separator) + 1 for separator in "-. /"), default=0)
        if all(len(stem) > cut for stem in stems.values()):
            stems = {name: stem[cut:] for name, stem in stems.items()}
    if len(set(stems.values())) < len(different):
        stems = {name: name for name in different}
    cutting = {name: _middle(stem) for name, stem in stems.items()}
    chosen = cutting if len(set(cutting.values())) == len(different) else stems
    return [chosen[name] for name in names]


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _middle(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = (_LONGEST - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
