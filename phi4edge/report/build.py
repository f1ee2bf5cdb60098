"""From result files to a report: found, joined, compared, and written as JSON, Markdown and one HTML page.

    paths ── find_documents ──▶ documents ── label, compare ──▶ comparisons, speeds ──▶ page ──▶ report.{json,md,html}

The same inputs give the same bytes: nothing of the time or of this machine goes in.
"""

from __future__ import annotations

__all__ = ["Report", "build_report", "write_report"]

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi4edge.core.atomic import write_bytes, write_json
from phi4edge.report.attribution import attribution_section, drift_part_data, parts_section
from phi4edge.report.compare import Comparison, SpeedGroup, compare_drift, compare_speed
from phi4edge.report.details import condition_text, detail_section, gate_section
from phi4edge.report.documents import Bench, Drift, Export, Failure, GreedyText, Quantization, TaskScore
from phi4edge.report.html import render_html
from phi4edge.report.labels import find_baseline, label_artifacts
from phi4edge.report.markdown import render_markdown
from phi4edge.report.method import method_section
from phi4edge.report.page import Items, Page
from phi4edge.report.provenance import estimate_section, provenance_section
from phi4edge.report.results import result_section
from phi4edge.report.runs import run_section
from phi4edge.report.scores import score_section
from phi4edge.report.search import Found, find_documents
from phi4edge.report.speeds import speed_section
from phi4edge.report.summary import headline, summarize


@dataclass(frozen=True)
class Report:
    """A report before it is written: ``data`` is what report.json holds, ``page`` what the others show."""

    data: dict[str, Any]
    page: Page
    found: Found
    comparisons: tuple[Comparison, ...]
    speeds: tuple[SpeedGroup, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, and why."""
        ignored = self.found.ignored
        listed = ", ".join(ignored[:3]) + (f" and {len(ignored) - 3} more" if len(ignored) > 3 else "")
        left_out = (f"{len(ignored)} JSON files are no results and were left out: {listed}",) if ignored else ()
        return left_out + self.found.notes


def build_report(paths: Iterable[Path], *, title: str | None = None, baseline: str | None = None) -> Report:
    """Read the results in ``paths`` and set them side by side; ``baseline`` names an artifact for ratios.

    Raises:
        InputError: no results, or a damaged one.
        UsageError: ``baseline`` names no artifact, or several.
    """
    found = find_documents(paths)
    drifts = [d for d in found.documents if isinstance(d, Drift)]
    benches = [d for d in found.documents if isinstance(d, Bench)]
    measured: list[Drift | Bench] = [*drifts, *benches]
    runs = [d for d in found.documents if isinstance(d, Quantization)]
    exports = [d for d in found.documents if isinstance(d, Export)]
    failures = [d for d in found.documents if isinstance(d, Failure)]
    scores = [d for d in found.documents if isinstance(d, TaskScore)]
    greedy = [d for d in found.documents if isinstance(d, GreedyText)]
    labels = label_artifacts(result.artifact for result in (*measured, *scores, *greedy))
    base = find_baseline(baseline, labels) if baseline is not None else None
    comparisons = compare_drift(drifts, labels, base)
    speeds = compare_speed(benches, labels)
    method = method_section(comparisons, speeds, runs)
    sections = (
        result_section(comparisons, speeds),
        score_section(scores, labels),
        detail_section(comparisons),
        parts_section(drifts, greedy, labels),
        attribution_section(drifts, labels),
        speed_section(speeds, comparisons),
        estimate_section(benches, labels),
        gate_section(comparisons),
        run_section(runs, exports),
        provenance_section(found, labels),
        method,
    )
    summary = summarize(comparisons, speeds, runs, failures, scores, greedy)
    page = Page(
        title or _title(drifts, runs, scores, greedy, benches),
        summary,
        tuple(section for section in sections if section is not None),
    )
    data = {
        "title": page.title,
        "summary": page.summary,
        "baseline": {"name": labels.full[base], "sha256": base} if base is not None else None,
        "artifacts": [asdict(artifact) | {"label": labels.full[sha]} for sha, artifact in labels.artifacts.items()],
        "comparisons": [_comparison(comparison) for comparison in comparisons],
        "drift_parts": drift_part_data(drifts, labels),
        "speeds": [asdict(group) for group in speeds],
        "tasks": [asdict(score) | {"label": labels.full[score.artifact.sha256]} for score in scores],
        "greedy": [asdict(text) | {"label": labels.full[text.artifact.sha256]} for text in greedy],
        "estimates": [
            {
                "label": labels.full[b.artifact.sha256],
                "target": b.target,
                "file": b.file,
                "metrics": _metrics(b.estimates),
            }
            for b in benches
            if b.estimates
        ],
        "quantizations": [asdict(run) for run in runs],
        "exports": [asdict(export) for export in exports],
        "failures": [asdict(failure) for failure in failures],
        "measurements": [
            {"file": d.file, "sha256": d.artifact.sha256, "runtime": asdict(d.runtime), "environment": d.environment}
            for d in measured
        ],
        "method": [
            {"about": lead, "text": text}
            for block in method.blocks
            if isinstance(block, Items)
            for lead, text in block.items
        ],
        "sources": [asdict(source) for source in found.sources],
        "ignored": list(found.ignored),
        "notes": [*found.notes, *labels.notes],
    }
    return Report(data, page, found, comparisons, speeds)


def _title(
    drifts: Sequence[Drift],
    runs: Sequence[Quantization],
    scores: Sequence[TaskScore],
    greedy: Sequence[GreedyText],
    benches: Sequence[Bench],
) -> str:
    """The models, and what was measured; nothing that was not."""
    models = [drift.reference.model for drift in drifts] or [run.model for run in runs]
    models = models or [text.reference for text in greedy]
    models = models or [score.reference.rpartition(" in ")[0] for score in scores]
    parts = [("drift", drifts), ("tasks", scores), ("greedy text", greedy), ("speed", benches)]
    said = [name for name, found in parts if found] or ["quantization"]
    measured = f"{', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else said[0]
    return f"{' and '.join(dict.fromkeys(models))}: {measured}" if models else measured.capitalize()


def _metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: asdict(metric) for name, metric in metrics.items()}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    best = headline(comparison)
    rows = [asdict(row) | {"at_noise_floor": comparison.at_noise_floor(row)} for row in comparison.rows]
    return {
        "condition": asdict(comparison.condition),
        "condition_text": condition_text(comparison),
        "baseline": comparison.baseline.label if comparison.baseline else None,
        "headline": best.label if best else None,
        "rows": rows,
        "notes": list(comparison.notes),
    }


def write_report(report: Report, out: Path) -> dict[str, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` into folder ``out``, each whole or not at all.

    The page is written last: whoever waits for it finds the others beside it.
    """
    files = {kind: out / f"report.{kind}" for kind in ("json", "md", "html")}
    texts = {"md": render_markdown(report.page), "html": render_html(report.page)}
    write_json(files["json"], {"schema": "phi4edge/report/1", "ok": True, "data": report.data})
    for kind, text in texts.items():
        write_bytes(files[kind], text.encode())
    return files
