"""How far candidates drift on every evaluation domain, and how two of them compare chunk by chunk.

One `phi4edge drift` a candidate and domain: a GGUF in llama.cpp, a run directory or a checkpoint through the torch
forward, all against the same stored reference logits. Standard errors are between chunks, the units that are
independent.
"""

from __future__ import annotations

__all__ = ["Domain", "evaluate", "paired_ratio"]

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candidates import Made, Work, child, phi4edge

from phi4edge.core.errors import InputError
from phi4edge.core.hashing import sha256_file, sha256_json


@dataclass(frozen=True)
class Domain:
    """A text to evaluate on, and how much of it."""

    name: str
    text: str  # what `phi4edge drift --text` takes
    chunks: int
    context: int

    @property
    def key(self) -> str:
        """What the figures depend on beside the artifact."""
        name, _, half = self.text.partition(":")
        text = sha256_file(Path(name)) if Path(name).is_file() else [name, sys.version]
        return sha256_json([text, half, self.chunks, self.context])


def evaluate(made: Made, work: Work, domain: Domain) -> dict[str, Any]:
    """The figures of one candidate on one domain, from a drift document that is made when it is not there yet.

    Raises:
        SystemExit: the measurement failed; the end of its log is shown.
    """
    folder = made.path.parent / "evaluation"
    document, note = folder / f"{domain.name}.json", folder / f"{domain.name}.key"
    key = sha256_json([made.key, domain.key])
    if not note.is_file() or note.read_text() != key:
        print(f"{work.folder.name}: measuring {made.path.parent.name} on {domain.name}", file=sys.stderr, flush=True)
        store = work.folder / "references" / f"{domain.name}-{sha256_json([work.key, domain.key])[:12]}"
        command = phi4edge("drift", made.path, "--reference", work.model, "--text", domain.text, "--store", store)
        command += ["--chunks", str(domain.chunks), "--context", str(domain.context), "--out", document, "--quiet"]
        child(command, folder / "log.txt")
        note.write_text(key)
    return figures(json.loads(document.read_text())["data"])


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of a drift document."""
    metrics, spread = data["metrics"], data["se_between_chunks"]
    return {
        "runtime": data["runtime"]["name"],
        "positions": data["text"]["positions"],
        "kld": metrics["kld"]["value"],
        "kld_se": spread["kld"],
        "kld_se_positions": metrics["kld"]["se"],
        "ln_ppl_ratio": metrics["ln_ppl_ratio"]["value"],
        "ln_ppl_ratio_se": spread["ln_ppl_ratio"],
        "same_top_p": metrics["same_top_p"]["value"],
        "same_top_p_se": spread["same_top_p"],
        "per_chunk_kld": data["per_chunk_kld"],
    }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean of ``ours`` over mean of ``theirs`` on the same chunks, and its standard error.

    With r = ā/b̄ and residuals dᵢ = aᵢ − r bᵢ (first-order expansion of the ratio, so what makes a chunk hard for both
    cancels):

        SE(r) = √(Σ dᵢ² / (n (n − 1))) / b̄                None for a single chunk

    Raises:
        InputError: different numbers of chunks, none, or a mean of zero to divide by.
    """
    n = len(theirs)
    if len(ours) != n or n == 0:
        raise InputError(f"{len(ours)} chunks against {n}: a pair needs the same ones")
    below = sum(theirs) / n
    if below == 0:
        raise InputError("the mean to divide by is 0", "the reference against itself has no ratio")
    ratio = sum(ours) / n / below
    if n == 1:
        return ratio, None
    squares = sum((a - ratio * b) ** 2 for a, b in zip(ours, theirs, strict=True))
    return ratio, math.sqrt(squares / (n * (n - 1))) / below
