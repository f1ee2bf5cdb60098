"""The measured drift of an artifact in its own model card, and the list of hashes brought up to date with it."""

from __future__ import annotations

__all__ = ["fill_card"]

from collections.abc import Iterable
from pathlib import Path

from phi4edge.core.atomic import write_bytes
from phi4edge.core.errors import InputError
from phi4edge.core.modelcard import with_drift
from phi4edge.core.sums import rehash
from phi4edge.measurement.artifact import describe
from phi4edge.report.compare import compare_drift
from phi4edge.report.documents import Drift
from phi4edge.report.labels import label_artifacts
from phi4edge.report.markdown import render_blocks
from phi4edge.report.results import drift_tables
from phi4edge.report.search import find_documents

CARD = "README.md"


def fill_card(folder: Path, results: Iterable[Path]) -> int:
    """Put the drift of the artifact in ``folder`` into its README.md; returns how many results that were.

    Results of other artifacts, by hash, are left out.

    Raises:
        InputError: no card that was made here, or no drift of this very artifact in ``results``.
    """
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if with_drift(text, "") is None:
        raise InputError(f"{card}: has no place for drift", "give a folder that phi4edge export wrote")
    sha256 = describe(folder)["sha256"]
    drifts = [d for d in find_documents(results).documents if isinstance(d, Drift) and d.artifact.sha256 == sha256]
    if not drifts:
        raise InputError(f"{folder}: no drift of it in the results", "measure it with `phi4edge drift --json`")
    comparisons = compare_drift(drifts, label_artifacts(drift.artifact for drift in drifts), None)
    filled = with_drift(text, render_blocks(drift_tables(comparisons)))
    assert filled is not None, "looked at before"
    write_bytes(card, filled.encode())
    rehash(folder, CARD)
    return len(drifts)
