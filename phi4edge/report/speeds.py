"""Speed: what was timed on which device, with every repetition as a dot."""

from __future__ import annotations

__all__ = ["COLUMNS", "speed_cell", "speed_section"]

from collections.abc import Iterable, Mapping, Sequence

from phi4edge.report.compare import Comparison, SpeedGroup, SpeedRow
from phi4edge.report.details import role
from phi4edge.report.numbers import plain
from phi4edge.report.page import ABSENT, Block, Cell, Column, Paragraph, Plots, Section, Table, metric_cell
from phi4edge.report.plots import SpeedPlot

COLUMNS = {
    "prefill_tps": Column("Prefill", "tok/s"),
    "decode_tps": Column("Decode", "tok/s"),
    "ttft_s": Column("TTFT", "ms"),
    "tpot_s": Column("TPOT", "ms"),
    "peak_rss_bytes": Column("Peak RSS", "MiB"),
    "idle_rss_bytes": Column("RSS before loading", "MiB"),
    "load_s": Column("Load", "s"),
}
_SCALES = {"ttft_s": 1e3, "tpot_s": 1e3, "peak_rss_bytes": 2.0**-20, "idle_rss_bytes": 2.0**-20}
_PLOTTED = ("prefill_tps", "decode_tps")


def speed_cell(row: SpeedRow, name: str) -> Cell:
    """A speed metric in the unit of its column."""
    return metric_cell(row.metric(name), _SCALES.get(name, 1.0))


def speed_section(speeds: Sequence[SpeedGroup], comparisons: Sequence[Comparison]) -> Section | None:
    """A table and two plots for each group, rows in the order of the main table; None where nothing was timed."""
    blocks = tuple(_blocks(speeds, comparisons))
    return Section("Speed", blocks) if blocks else None


def _blocks(speeds: Sequence[SpeedGroup], comparisons: Sequence[Comparison]) -> Iterable[Block]:
    roles = {row.artifact.sha256: role(row, c) for c in reversed(comparisons) for row in c.rows}
    order = list(dict.fromkeys(row.artifact.sha256 for comparison in comparisons for row in comparison.rows))
    place = {sha: i for i, sha in enumerate(order)}
    if len(speeds) > 1:
        yield Paragraph("Speeds of different devices, runtimes or settings stand apart and must not be compared.")
    for group in speeds:
        rows = sorted(group.rows, key=lambda row: place.get(row.artifact.sha256, len(place)))
        yield _table(group, rows)
        plots = tuple(plot for name in _PLOTTED if (plot := _plot(name, rows, roles)) is not None)
        if plots:
            yield Plots(plots)


def _table(group: SpeedGroup, rows: Sequence[SpeedRow]) -> Table:
    present = list(dict.fromkeys(name for row in rows for name in row.metrics))
    names = [name for name in COLUMNS if name in present]
    others = [name for name in present if name not in COLUMNS]
    units = {n: next((row.metrics[n].unit for row in rows if n in row.metrics), None) or "" for n in others}
    medians = [name for name in _PLOTTED if any(row.metric(name).median for row in rows)]
    columns = [Column("Artifact", numeric=False), *(COLUMNS[name] for name in names)]
    columns += [Column(f"{COLUMNS[name].title}, median", COLUMNS[name].unit) for name in medians]
    columns += [Column(name, units[name]) for name in others]
    cells = []
    for row in rows:
        middles = [row.metric(name).median for name in medians]
        cells.append(
            (
                Cell(row.label, tag="implausible" if row.implausible else ""),
                *(speed_cell(row, name) for name in names),
                *(ABSENT if middle is None else Cell(plain(middle)) for middle in middles),
                *(metric_cell(row.metric(name)) for name in others),
            )
        )
    notes = tuple(f"{row.label}, implausible: {row.implausible}." for row in rows if row.implausible)
    return Table(tuple(columns), tuple(cells), f"{group.title}{_repetitions(group, rows)}.", notes)


def _repetitions(group: SpeedGroup, rows: Sequence[SpeedRow]) -> str:
    most = max(len(row.metric(name).samples) for row in rows for name in _PLOTTED)
    if not most:
        return ""
    warmup = group.settings.get("warmup")
    warm = f" after {warmup} warm-up that does not count" if isinstance(warmup, int) and warmup else ""
    return f"; {most} repetitions{warm}, ± is one standard error over them"


def _plot(name: str, rows: Sequence[SpeedRow], roles: Mapping[str, str]) -> SpeedPlot | None:
    bars = [
        (row.short, value, row.metric(name).samples, roles.get(row.artifact.sha256, "other"))
        for row in rows
        if (value := row.metric(name).value) is not None
    ]
    if not bars:
        return None
    most = max(len(samples) for _, _, samples, _ in bars)
    dots = f"; dots: every one of {most} repetitions" if most else ""
    caption = f"Bar: the mean{dots}. More is better."
    return SpeedPlot(f"{COLUMNS[name].title} speed", COLUMNS[name].unit, tuple(bars), caption)
