"""Where every figure comes from: artifacts, references, runtimes, environments and files, each with its hash."""

from __future__ import annotations

__all__ = ["estimate_section", "provenance_section"]

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phi4edge.core.memory import format_bytes
from phi4edge.report.documents import Bench, Drift, Failure
from phi4edge.report.labels import Labels
from phi4edge.report.numbers import plain
from phi4edge.report.page import ABSENT, Block, Cell, Column, Heading, Section, Table, metric_cell
from phi4edge.report.search import Found

_LONGEST = 400  # characters of one value of an environment


def _columns(*titles: str) -> tuple[Column, ...]:
    return tuple(Column(title, numeric=False) for title in titles)


def provenance_section(found: Found, labels: Labels) -> Section:
    """Artifacts, runtimes, references, texts, environments, failures and files, each with its hash."""
    drifts = [d for d in found.documents if isinstance(d, Drift)]
    benches = [d for d in found.documents if isinstance(d, Bench)]
    failures = [d for d in found.documents if isinstance(d, Failure)]
    blocks: list[Block] = []
    if failures:
        blocks += [Heading("Commands that ended in an error"), _failures(failures)]
    if labels.artifacts:
        blocks.append(_artifacts(labels))
    if drifts:
        blocks.append(_references(drifts))
    if drifts or benches:
        blocks.append(_runtimes([*drifts, *benches]))
        blocks += _environments([*drifts, *benches])
    blocks.append(_sources(found, labels))
    return Section("Environment and provenance", tuple(blocks))


def _failures(failures: Sequence[Failure]) -> Table:
    rows = [
        (
            Cell(failure.command, code=True),
            Cell(str(failure.code)) if failure.code is not None else ABSENT,
            Cell(failure.message + (f" (hint: {failure.hint})" if failure.hint else "")),
            Cell(failure.file),
        )
        for failure in failures
    ]
    return Table(_columns("Command", "Exit code", "Message", "File"), tuple(rows))


def _artifacts(labels: Labels) -> Table:
    rows = [
        (
            Cell(labels.full[sha]),
            Cell(artifact.format or "–"),
            Cell(artifact.scheme or "–"),
            Cell(f"{artifact.bytes:,}") if artifact.bytes else ABSENT,
            Cell(sha, code=True),
        )
        for sha, artifact in labels.artifacts.items()
    ]
    columns = (*_columns("Artifact", "Format", "Scheme"), Column("Bytes"), *_columns("SHA-256"))
    return Table(columns, tuple(rows), "Artifacts.")


def _references(drifts: Sequence[Drift]) -> Table:
    rows: dict[tuple[Cell, ...], None] = {}
    for drift in drifts:
        r, t = drift.reference, drift.text
        floor = ABSENT if r.noise_floor_kld is None else Cell(plain(r.noise_floor_kld))
        stored = ", ".join(part for part in (r.dtype, r.encoding) if part) or "–"
        model = (Cell(r.model), Cell(r.fingerprint, code=True), Cell(stored), floor)
        rows[(*model, Cell(t.name), Cell(t.sha256, code=True))] = None
    columns = (*_columns("Reference", "Fingerprint", "Computed and stored as"), Column("Noise floor", "nat"))
    return Table((*columns, *_columns("Text", "SHA-256 of the text")), tuple(rows), "References and texts.")


def _runtimes(results: Sequence[Drift | Bench]) -> Table:
    used: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        settings = ", ".join(f"{key} {value}" for key, value in _flat(result.runtime.conditions)) or "–"
        kind = "drift" if isinstance(result, Drift) else "speed"
        used.setdefault((result.runtime.label, kind, settings), []).append(result.file)
    rows = [
        (Cell(name), Cell(kind), Cell(settings), Cell(_few(files))) for (name, kind, settings), files in used.items()
    ]
    return Table(_columns("Runtime", "For", "Settings", "Results"), tuple(rows), "Runtimes.")


def _environments(results: Sequence[Drift | Bench]) -> Iterable[Table]:
    """One table with what all environments share, and a column each where they differ."""
    distinct: dict[str, tuple[dict[str, str], list[str]]] = {}
    for result in results:
        if result.environment:
            flat = dict(_flat(result.environment))
            distinct.setdefault(json.dumps(flat, sort_keys=True), (flat, []))[1].append(result.file)
    if not distinct:
        return
    environments = list(distinct.values())
    keys = list(dict.fromkeys(key for flat, _ in environments for key in flat))
    same = [key for key in keys if len({flat.get(key) for flat, _ in environments}) == 1]
    rows = [(Cell(key, code=True), Cell(environments[0][0][key])) for key in same]
    if rows:
        yield Table(_columns("Environment", "Value"), tuple(rows), f"Environment of all {len(results)} measurements.")
    varying = [key for key in keys if key not in same]
    if varying:
        body = [(Cell(_few(files)), *(Cell(flat.get(key, "–")) for key in varying)) for flat, files in environments]
        yield Table(_columns("Results", *varying), tuple(body), "Where the environments differ.")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted names and printed values of nested objects."""
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict) and "value" not in inner:
            yield from _flat(inner, f"{name}.")
        elif isinstance(inner, dict):
            reason = inner.get("reason")
            known = inner["value"] is not None
            yield name, f"{inner['value']} {inner.get('unit') or ''}".strip() if known else f"not known ({reason})"
        elif isinstance(inner, list):
            yield name, _cut(", ".join(map(str, inner)))
        else:
            size = isinstance(inner, int) and key.endswith("_bytes")
            yield name, "not known" if inner is None else format_bytes(inner) if size else _cut(str(inner))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _few(names: Sequence[str], most: int = 4) -> str:
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def _sources(found: Found, labels: Labels) -> Table:
    rows = [(Cell(s.name), Cell(s.schema, code=True), Cell(s.sha256, code=True)) for s in found.sources]
    notes = [*found.notes, *labels.notes]
    if found.ignored:
        notes.append(f"Other JSON files, left out: {_few(found.ignored, 8)}.")
    return Table(_columns("File", "Holds", "SHA-256"), tuple(rows), "Files that this page was made of.", tuple(notes))


def estimate_section(benches: Sequence[Bench], labels: Labels) -> Section | None:
    """Figures that nobody measured, apart from all that were; None where there are none."""
    rows = []
    for bench in benches:
        for name, metric in bench.estimates.items():
            value = metric_cell(metric)
            words = name.removesuffix("_estimated").replace("_", " ")
            text = Cell(f"{value.text}, estimated" if metric.value is not None else value.text, value.se, muted=True)
            artifact = Cell(labels.full[bench.artifact.sha256])
            rows.append((artifact, Cell(bench.target), Cell(f"{words}, estimated"), text, Cell(metric.unit or "–")))
    columns = (*_columns("Artifact", "Target", "Quantity"), Column("Estimated value"), *_columns("Unit"))
    return Section("Estimates", (Table(columns, tuple(rows), "Estimated, not measured."),)) if rows else None
