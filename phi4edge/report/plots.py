"""The report's four plots. Each is a value (what it shows, as numbers) with a ``draw`` that makes an inline SVG of it.

Every plot is drawn about 400 points wide, so that it is legible on a phone and two of them stand side by side on a
desk.
"""

from __future__ import annotations

__all__ = [
    "BlockPlot",
    "BlockSeries",
    "Plot",
    "QuantilePlot",
    "QuantileRow",
    "SizePlot",
    "SizePoint",
    "SpeedPlot",
    "log_limits",
    "log_ticks",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from phi4edge.report.numbers import plain
from phi4edge.report.svg import ROLES, Box, Canvas, canvas, place_labels, to_inline_svg

WIDTH = 400.0
_ROLE_COLOURS = {"best": "accent", "baseline": "contrast", "other": "muted"}
_MARKERS = ("o", "s", "^", "D", "v", "P")


class Plot(Protocol):
    """What the page needs of a plot."""

    @property
    def title(self) -> str:
        """What is to be seen."""
        ...

    @property
    def caption(self) -> str:
        """How to read it."""
        ...

    def draw(self, prefix: str) -> str:
        """An ``<svg>`` element whose identifiers begin with ``prefix``."""
        ...


def log_ticks(axis: Any, values: Sequence[float], *, least: int = 2) -> None:
    """Ticks at 1, 2, 5 of each decade, or fewer where there are many; written as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        if sum(low <= tick <= high for tick in ticks) > least:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def log_limits(low: float, high: float, margin: float = 0.12) -> tuple[float, float]:
    """Limits of a logarithmic axis with some room around ``low`` and ``high``."""
    room = max(math.log10(high / low), 0.15) * margin
    return low / 10**room, high * 10**room


@dataclass(frozen=True)
class SizePoint:
    """An artifact of ``mebibytes`` MiB whose mean KLD is ``kld`` nat; ``role`` is best, baseline or other."""

    label: str
    mebibytes: float
    kld: float
    se: float | None
    role: str


@dataclass(frozen=True)
class SizePlot:
    """Mean KLD against size."""

    points: tuple[SizePoint, ...]
    noise_floor: float | None
    left_out: tuple[str, ...]  # labels without a size, or with a KLD that a logarithmic axis cannot show
    title: str = "Drift against size"

    @property
    def caption(self) -> str:
        """See :class:`Plot`."""
        text = "Mean KLD (nat, logarithmic) against size (MiB); bars are one standard error."
        if self.noise_floor:
            line = "Dashed: the" if self._floor_shown else "Far below what is shown: the"
            text += f" {line} reference's noise floor, {plain(self.noise_floor)}."
        return text + (f" Not shown: {', '.join(self.left_out)}." if self.left_out else "")

    @property
    def _floor_shown(self) -> bool:
        return self.noise_floor is not None and self.noise_floor > min(p.kld for p in self.points) / 5

    def draw(self, prefix: str) -> str:
        """See :class:`Plot`."""
        floor = self.noise_floor if self._floor_shown else None
        with canvas(WIDTH, 290) as drawing:
            axes = drawing.axes
            axes.set_yscale("log")
            for p in self.points:
                colour = ROLES[_ROLE_COLOURS[p.role]]
                low = min(p.se or 0.0, p.kld * 0.9)  # a bar down to zero has no end on this axis
                axes.errorbar(
                    [p.mebibytes],
                    [p.kld],
                    yerr=[[low], [p.se or 0.0]],
                    fmt="D" if p.role == "baseline" else "o",
                    markersize=5.5,
                    color=colour,
                    markerfacecolor=ROLES["paper"] if p.role == "baseline" else colour,
                    markeredgewidth=1.2,
                    capsize=2.5,
                    elinewidth=1.0,
                )
            shown = [p.kld for p in self.points] + ([floor] if floor else [])
            axes.set_ylim(*log_limits(min(shown), max(shown), 0.14))
            log_ticks(axes.yaxis, axes.get_ylim())
            sizes = [p.mebibytes for p in self.points]
            spread = max(sizes) - min(sizes) or max(sizes)
            axes.set_xlim(max(0.0, min(sizes) - 0.18 * spread), max(sizes) + 0.18 * spread)
            axes.set_xlabel("Size (MiB)")
            axes.set_ylabel("Mean KLD (nat)")
            axes.grid(visible=False, axis="x")
            if floor:
                axes.axhline(floor, color=ROLES["muted"], linestyle=(0, (4, 3)), linewidth=0.8)
            self._label(drawing, floor)
            return to_inline_svg(drawing, prefix, self.title)

    def _label(self, drawing: Canvas, floor: float | None) -> None:
        axes, renderer = drawing.axes, drawing.renderer()
        drawing.figure.draw_without_rendering()
        drawing.figure.set_layout_engine("none")  # the places below hold only if nothing moves any more
        centres = [tuple(axes.transData.transform((p.mebibytes, p.kld))) for p in self.points]
        taken: list[Box] = []
        for point, (x, y) in zip(self.points, centres, strict=True):
            taken.append((x - 4, y - 4, x + 4, y + 4))
            ends = [max(point.kld - (point.se or 0.0), point.kld * 0.1), point.kld + (point.se or 0.0)]
            bottom, top = (axes.transData.transform((point.mebibytes, end))[1] for end in ends)
            taken.append((x - 3, bottom - 1, x + 3, top + 1))
        if floor:
            y = axes.transData.transform((0, floor))[1]
            taken.append((0, y - 1, WIDTH, y + 1))
        texts = [axes.text(0, 0, point.label, size=8) for point in self.points]
        extents = [text.get_window_extent(renderer) for text in texts]
        box = axes.get_window_extent(renderer)
        inside = (box.x0 + 2, box.y0 + 2, WIDTH - 2, box.y1 + 8)
        places = place_labels(centres, [(e.width, e.height) for e in extents], taken, inside)
        back = axes.transData.inverted()
        for point, text, place, (x, y) in zip(self.points, texts, places, centres, strict=True):
            text.remove()
            if place is None:  # crowded out: the table has it
                continue
            middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
            far = math.hypot(max(place[0] - x, x - place[2], 0), max(place[1] - y, y - place[3], 0)) > 9
            if far:
                end = (min(max(x, place[0]), place[2]), min(max(y, place[1]), place[3]))
                xs, ys = zip(back.transform((x, y)), back.transform(end), strict=True)
                axes.plot(xs, ys, color=ROLES["muted"], linewidth=0.5, zorder=1)
            colour = ROLES["ink" if point.role == "other" else _ROLE_COLOURS[point.role]]
            xy = back.transform(middle)
            axes.text(*xy, point.label, size=8, ha="center", va="center", color=colour, clip_on=False)


@dataclass(frozen=True)
class QuantileRow:
    """KLD quantiles of an artifact, name → nat, all positive; ``mean`` likewise, where positive."""

    label: str
    quantiles: dict[str, float]
    mean: float | None
    role: str


@dataclass(frozen=True)
class QuantilePlot:
    """How KLD is spread over positions."""

    rows: tuple[QuantileRow, ...]
    title: str = "How the drift is spread over positions"
    caption: str = (
        "KLD over scored positions (nat, logarithmic), one line an artifact, its ticks from left to right at 50, 90, "
        "95, 99 and 99.9 % of positions; the open diamond is the mean. A mean far to the right of the median says that "
        "few positions carry most of the drift."
    )

    def draw(self, prefix: str) -> str:
        """See :class:`Plot`."""
        with canvas(WIDTH, 74 + 24.0 * len(self.rows)) as drawing:
            axes = drawing.axes
            axes.set_xscale("log")
            values: list[float] = []
            for y, row in enumerate(reversed(self.rows)):
                colour = ROLES[_ROLE_COLOURS[row.role]]
                xs = list(row.quantiles.values())
                values += xs + ([row.mean] if row.mean else [])
                axes.plot(xs, [y] * len(xs), color=colour, linewidth=1.0, marker="|", markersize=8, markeredgewidth=1.4)
                if row.mean:
                    axes.plot(
                        [row.mean],
                        [y],
                        marker="D",
                        markersize=5,
                        color=colour,
                        markerfacecolor=ROLES["paper"],
                        markeredgewidth=1.2,
                    )
            top = self.rows[0]
            self._name_quantiles(axes, top, len(self.rows) - 1)
            axes.set_xlim(*log_limits(min(values), max(values), 0.06))
            axes.set_ylim(-0.6, len(self.rows) - 0.1)
            axes.set_yticks(range(len(self.rows)), [row.label for row in reversed(self.rows)])
            log_ticks(axes.xaxis, axes.get_xlim())
            axes.set_xlabel("KLD of a position (nat)")
            axes.spines["left"].set_visible(False)
            axes.grid(visible=False, axis="y")
            return to_inline_svg(drawing, prefix, self.title)

    def _name_quantiles(self, axes: Any, row: QuantileRow, y: int) -> None:
        """Names above the first line; one that would run into its left neighbour is dropped."""
        low = min(min(r.quantiles.values()) for r in self.rows)
        high = max(max(r.quantiles.values()) for r in self.rows)
        least = math.log10(high / low) * 0.055 if high > low else 0.0
        last = -math.inf
        for name, value in sorted(row.quantiles.items(), key=lambda item: -item[1]):
            place = math.log10(value)
            if math.isinf(last) or last - place >= least:
                axes.annotate(
                    name,
                    (value, y),
                    xytext=(0, 8),
                    textcoords="offset points",
                    ha="center",
                    size=7,
                    color=ROLES["muted"],
                    annotation_clip=False,
                )
                last = place


@dataclass(frozen=True)
class SpeedPlot:
    """One speed of several artifacts: the value as a bar, every repetition as a dot."""

    title: str
    unit: str
    rows: tuple[tuple[str, float, tuple[float, ...], str], ...]  # label, value, samples, role
    caption: str

    def draw(self, prefix: str) -> str:
        """See :class:`Plot`."""
        with canvas(WIDTH, 52 + 24.0 * len(self.rows)) as drawing:
            axes = drawing.axes
            highest = max(max((value, *samples)) for _, value, samples, _ in self.rows)
            for y, (_, value, samples, role) in enumerate(reversed(self.rows)):
                colour = ROLES[_ROLE_COLOURS[role]]
                axes.barh([y], [value], height=0.56, color=colour, alpha=0.28, linewidth=0)
                axes.plot([value, value], [y - 0.28, y + 0.28], color=colour, linewidth=1.6)
                spread = [y + 0.1 * ((i % 3) - 1) for i in range(len(samples))]
                axes.plot(samples, spread, linestyle="none", marker="o", markersize=2.8, color=colour)
                axes.annotate(
                    plain(value),
                    (max((value, *samples)), y),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    size=8,
                    annotation_clip=False,
                )
            axes.set_xlim(0, highest * 1.16)
            axes.set_ylim(-0.6, len(self.rows) - 0.4)
            axes.set_yticks(range(len(self.rows)), [row[0] for row in reversed(self.rows)])
            axes.set_xlabel(self.unit)
            axes.spines["left"].set_visible(False)
            axes.grid(visible=False, axis="y")
            return to_inline_svg(drawing, prefix, self.title)


@dataclass(frozen=True)
class BlockSeries:
    """One linear of every block: block, ratio to RTN, whether RTN's weights were taken in the end."""

    name: str
    points: tuple[tuple[int, float, bool], ...]


@dataclass(frozen=True)
class BlockPlot:
    """Held-out error of each linear divided by rounding to nearest's, by block."""

    title: str
    series: tuple[BlockSeries, ...]
    caption: str

    def draw(self, prefix: str) -> str:
        """See :class:`Plot`."""
        with canvas(WIDTH, 260) as drawing:
            axes = drawing.axes
            axes.set_yscale("log")
            ratios = [ratio for series in self.series for _, ratio, _ in series.points]
            blocks = [block for series in self.series for block, _, _ in series.points]
            offsets = [0.13 * (i - (len(self.series) - 1) / 2) for i in range(len(self.series))]
            for i, (series, offset) in enumerate(zip(self.series, offsets, strict=True)):
                colour = ROLES[f"series-{i % 4 + 1}"]
                style = {"linestyle": "none", "marker": _MARKERS[i % len(_MARKERS)], "markersize": 3.6, "color": colour}
                kept = [(block + offset, ratio) for block, ratio, fell_back in series.points if not fell_back]
                fallen = [(block + offset, ratio) for block, ratio, fell_back in series.points if fell_back]
                axes.plot([x for x, _ in kept], [y for _, y in kept], label=series.name, **style)
                hollow = style | {"markerfacecolor": ROLES["paper"], "markeredgewidth": 1.0}
                axes.plot([x for x, _ in fallen], [y for _, y in fallen], **hollow)
            axes.axhline(1.0, color=ROLES["ink"], linewidth=0.8)
            low, high = log_limits(min(*ratios, 1.0), max(*ratios, 1.0), 0.08)
            axes.set_ylim(low, high)
            log_ticks(axes.yaxis, (low, high))
            axes.set_xlim(min(blocks) - 0.7, max(blocks) + 0.7)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("Block")
            axes.set_ylabel("Held-out error ÷ RTN's")
            axes.grid(visible=False, axis="x")
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 1.0),
                ncols=4,
                handletextpad=0.1,
                columnspacing=1.0,
                borderaxespad=0.2,
            )
            return to_inline_svg(drawing, prefix, self.title)


def speed_caption(samples: int) -> str:
    """How to read a :class:`SpeedPlot`."""
    return f"Bar: the reported value; dots: each of up to {samples} repetitions; more is better." if samples else ""
