"""The part of the page about quantization: what runs did, what they fell back to, how each linear fared."""

from __future__ import annotations

__all__ = ["run_section"]

import re
import statistics
from collections.abc import Iterable, Sequence

from phi4edge.report.documents import Export, HeldOut, Linear, Quantization
from phi4edge.report.numbers import mebibytes, plain
from phi4edge.report.page import ABSENT, Block, Cell, Column, Heading, Paragraph, Plots, Section, Table
from phi4edge.report.plots import BlockPlot, BlockSeries
from phi4edge.report.refinements import mix_block, rounding_block, tuning_block

_BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_MOST_EVENTS = 40  # rows; events of one kind and wording share a row


def run_section(runs: Sequence[Quantization], exports: Sequence[Export]) -> Section | None:
    """Runs side by side, then each run's events and linears; None where there is no run."""
    blocks: list[Block] = []
    if runs:
        blocks.append(_overview(runs))
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(f"Run {run.run}: {run.method} {run.scheme}"))
        if run.mix is not None:
            blocks.append(mix_block(run.mix))
        blocks += _events(run)
        if run.rounding:
            blocks.append(rounding_block(run.rounding))
        if run.tuning is not None:
            blocks.append(tuning_block(run.tuning))
        blocks += _linears(run)
    if exports:
        blocks.append(_exports(exports))
    return Section("Quantization", tuple(blocks)) if blocks else None


def _overview(runs: Sequence[Quantization]) -> Table:
    columns = (
        *(Column(title, numeric=False) for title in ("Run", "Model", "Method", "Scheme", "Calibration")),
        Column("Tokens"),
        Column("Quantized", "% of parameters"),
        Column("Linears"),
        Column("Not by the method", "linears"),
        Column("Time", "s"),
        Column("Peak RSS", "MiB"),
    )
    rows = []
    for run in runs:
        corpus = run.corpus or {}
        tokens, samples, length = (corpus.get(key) for key in ("tokens", "samples", "sequence_length"))
        shape = f", {samples} × {length}" if isinstance(samples, int) and isinstance(length, int) else ""
        fallen = sum(linear.method != run.method for linear in run.linears)
        rows.append(
            (
                Cell(run.run),
                Cell(run.model),
                Cell(run.method),
                Cell(run.scheme),
                Cell(f"{corpus.get('name', 'corpus')}{shape}") if run.corpus else Cell("none: data-free"),
                Cell(f"{tokens:,}") if isinstance(tokens, int) else ABSENT,
                Cell(plain(100 * run.quantized_fraction)),
                Cell(str(len(run.linears))),
                Cell(str(fallen)),
                Cell(plain(run.seconds)) if run.seconds is not None else Cell("not recorded", muted=True),
                Cell(mebibytes(run.peak_rss_bytes)) if run.peak_rss_bytes else Cell("not recorded", muted=True),
            )
        )
    note = "What is not quantized here (embedding, head, norms) has the type that the export gave it."
    return Table(columns, tuple(rows), "What was quantized, and what it took.", (note,))


def _events(run: Quantization) -> Iterable[Block]:
    if not run.events:
        yield Paragraph("The run recorded no events: no fallback, no added damping, no warning.")
        return
    grouped: dict[tuple[str, str], list[str]] = {}
    for event in run.events:
        kind, detail, where = (str(event.get(key, "")) for key in ("kind", "detail", "where"))
        grouped.setdefault((kind, detail), []).append(where)
    rows = [
        (Cell(kind, code=True), Cell(str(len(places))), Cell(detail), Cell(_places(places)))
        for (kind, detail), places in grouped.items()
    ]
    words = [Column(title, numeric=False) for title in ("Event", "What", "Where")]
    columns = (words[0], Column("Count"), *words[1:])
    left = len(rows) - _MOST_EVENTS
    notes = (f"{left} further kinds of event are in report.json.",) if left > 0 else ()
    caption = f"Events of the run, {len(run.events)} in all; each with its values in report.json."
    yield Table(columns, tuple(rows[:_MOST_EVENTS]), caption, notes)


def _places(names: Sequence[str]) -> str:
    """``qkv_proj of blocks 3, 8; down_proj of block 11``: names of linears by kind, others as they are."""
    kinds: dict[str, list[int]] = {}
    others: list[str] = []
    for name in names:
        match = _BLOCK.fullmatch(name)
        if match:
            kinds.setdefault(match[2].rsplit(".", 1)[-1], []).append(int(match[1]))
        elif name:
            others.append(name)
    parts = [
        f"{kind} of block{'s' if len(blocks) > 1 else ''} {_ranges(sorted(blocks))}" for kind, blocks in kinds.items()
    ]
    return "; ".join(parts + list(dict.fromkeys(others)))


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 3–5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number <= spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" if b > a + 1 else f"{a}, {b}" for a, b in spans)


def _ratio(linear: Linear, position: str) -> float | None:
    ours, theirs = linear.heldout_error, linear.heldout_error_rtn
    if ours is None or theirs is None:
        return None
    top, bottom = _error(ours, position), _error(theirs, position)
    return top / bottom if top is not None and bottom else None


def _error(error: HeldOut, position: str) -> float | None:
    return error.first if position == "first" else error.rest


def _linears(run: Quantization) -> Iterable[Block]:
    """Held-out error against RTN's: a row a kind of linear, and a dot a linear."""
    kinds: dict[str, list[Linear]] = {}
    for linear in run.linears:
        match = _BLOCK.fullmatch(linear.name)
        kinds.setdefault(match[2].rsplit(".", 1)[-1] if match else linear.name, []).append(linear)
    compared = {kind: [x for x in linears if _ratio(x, "rest") is not None] for kind, linears in kinds.items()}
    compared = {kind: linears for kind, linears in compared.items() if linears}
    if not compared:
        yield Paragraph("No linear was compared with rounding to nearest on samples kept aside.")
        return
    apart = any(_ratio(x, "first") is not None for linears in compared.values() for x in linears)
    columns = [
        Column("Linear", numeric=False),
        Column("Compared"),
        Column(f"Not by {run.method}"),
        Column("Median ratio"),
    ]
    columns += [Column("Worst ratio"), Column("Worst in block")]
    columns += [Column("Median, first positions"), Column("Worst, first positions")] if apart else []
    rows = []
    for kind, linears in compared.items():
        ratios = {x.name: r for x in linears if (r := _ratio(x, "rest")) is not None}
        worst = max(ratios, key=lambda name: ratios[name])
        match = _BLOCK.fullmatch(worst)
        cells = [Cell(kind), Cell(str(len(ratios))), Cell(str(sum(x.method != run.method for x in linears)))]
        cells += [Cell(plain(statistics.median(ratios.values()))), Cell(plain(ratios[worst]))]
        cells += [Cell(match[1]) if match else ABSENT]
        firsts = [r for x in linears if (r := _ratio(x, "first")) is not None]
        if apart:
            cells += [Cell(plain(statistics.median(firsts))), Cell(plain(max(firsts)))] if firsts else [ABSENT] * 2
        rows.append(tuple(cells))
    caption = (
        f"Output error of each linear on calibration samples kept aside, {run.method} ÷ RTN; below 1 is better, "
        "wherever the method's own weights were taken or not."
    )
    yield Table(tuple(columns), tuple(rows), caption)
    plots = [
        plot for position in ("rest", "first") if (plot := _plot(run, compared, position, apart=apart)) is not None
    ]
    if plots:
        yield Plots(tuple(plots))


def _plot(run: Quantization, compared: dict[str, list[Linear]], position: str, *, apart: bool) -> BlockPlot | None:
    series = []
    for kind, linears in compared.items():
        points = []
        for linear in linears:
            match, ratio = _BLOCK.fullmatch(linear.name), _ratio(linear, position)
            if match and ratio:
                points.append((int(match[1]), ratio, linear.method != run.method))
        if points:
            series.append(BlockSeries(kind, tuple(points)))
    if not series:
        return None
    places = {"rest": "positions after the first", "first": "the first position of each sample"}
    where = f", {places[position]}" if apart else ""
    return BlockPlot(
        title=f"Each linear against rounding to nearest{where}",
        series=tuple(series),
        caption=f"Held-out output error of {run.method} ÷ RTN (logarithmic), by block. Below the line {run.method} is "
        "better; an open mark is a linear that took RTN's weights in the end.",
    )


def _exports(exports: Sequence[Export]) -> Table:
    words = [Column(title, numeric=False) for title in ("Exported artifact", "Format", "Scheme")]
    columns = (*words, Column("As integer codes", "% of parameters"))
    rows = [
        (
            Cell(export.name),
            Cell(export.format),
            Cell(export.scheme) if export.scheme else ABSENT,
            Cell(plain(100 * export.quantized_fraction)) if export.quantized_fraction is not None else ABSENT,
        )
        for export in exports
    ]
    return Table(columns, tuple(rows), "Exports.")
