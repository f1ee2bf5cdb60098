"""Plots of what drift is made of: by position in the chunk, by tensor measured alone, and output errors by block."""

from __future__ import annotations

__all__ = ["OutputErrorPlot", "PositionLine", "PositionPlot", "TensorPlot"]

from dataclasses import dataclass

from phi4edge.report.plots import log_limits, log_ticks
from phi4edge.report.svg import ROLES, canvas, to_inline_svg

WIDTH = 400.0
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LEGEND = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "handletextpad": 0.3, "columnspacing": 1.0}


@dataclass(frozen=True)
class PositionLine:
    """One artifact: middle of a run of positions, value, standard error."""

    label: str
    points: tuple[tuple[float, float, float | None], ...]


@dataclass(frozen=True)
class PositionPlot:
    """A mean by position within the chunk."""

    title: str
    unit: str
    lines: tuple[PositionLine, ...]
    caption: str

    def draw(self, prefix: str) -> str:
        """See :class:`phi4edge.report.plots.Plot`."""
        with canvas(WIDTH, 260) as drawing:
            axes = drawing.axes
            for i, line in enumerate(self.lines):
                axes.errorbar(
                    [x for x, _, _ in line.points],
                    [y for _, y, _ in line.points],
                    yerr=[se or 0.0 for _, _, se in line.points],
                    label=line.label,
                    color=ROLES[f"series-{i % 4 + 1}"],
                    marker=_MARKERS[i % len(_MARKERS)],
                    markersize=3.2,
                    elinewidth=0.8,
                    capsize=1.5,
                )
            axes.set_xlabel("Position in the chunk")
            axes.set_ylabel(f"{self.title} ({self.unit})")
            axes.legend(ncols=2, **_LEGEND)
            return to_inline_svg(drawing, prefix, self.title)


@dataclass(frozen=True)
class TensorPlot:
    """KLD of single tensors, the costliest at the top: (name, alone, its error, saved, its error)."""

    bars: tuple[tuple[str, float, float | None, float, float | None], ...]
    caption: str
    title: str = "What single tensors cost"

    def draw(self, prefix: str) -> str:
        """See :class:`phi4edge.report.plots.Plot`."""
        with canvas(WIDTH, 70 + 26 * len(self.bars)) as drawing:
            axes = drawing.axes
            places = list(range(len(self.bars)))
            for offset, index, label, colour in ((-0.2, 1, "alone", "series-1"), (0.2, 3, "saved", "series-2")):
                axes.barh(
                    [place + offset for place in places],
                    [float(bar[index] or 0.0) for bar in self.bars],
                    height=0.36,
                    xerr=[float(bar[index + 1] or 0.0) for bar in self.bars],
                    color=ROLES[colour],
                    ecolor=ROLES["ink"],
                    error_kw={"elinewidth": 0.8, "capsize": 1.5},
                    label=label,
                )
            axes.set_yticks(places, [bar[0] for bar in self.bars])
            axes.invert_yaxis()
            axes.set_xlabel("Mean KLD (nat)")
            axes.grid(visible=False, axis="y")
            axes.legend(ncols=2, **_LEGEND)
            return to_inline_svg(drawing, prefix, self.title)


@dataclass(frozen=True)
class OutputErrorPlot:
    """Relative output error of each linear by block: name of the linear, and (block, error) where it is not 0."""

    series: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    caption: str
    title: str = "Output error of every linear"

    def draw(self, prefix: str) -> str:
        """See :class:`phi4edge.report.plots.Plot`."""
        with canvas(WIDTH, 260) as drawing:
            axes = drawing.axes
            axes.set_yscale("log")
            for i, (name, points) in enumerate(self.series):
                axes.plot(
                    [block + 0.13 * (i - (len(self.series) - 1) / 2) for block, _ in points],
                    [error for _, error in points],
                    label=name,
                    linestyle="none",
                    marker=_MARKERS[i % len(_MARKERS)],
                    markersize=3.6,
                    color=ROLES[f"series-{i % 4 + 1}"],
                )
            shown = [error for _, points in self.series for _, error in points]
            limits = log_limits(min(shown), max(shown), 0.08)
            axes.set_ylim(*limits)
            log_ticks(axes.yaxis, limits)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("Block")
            axes.set_ylabel("Relative output error")
            axes.grid(visible=False, axis="x")
            axes.legend(ncols=2, **_LEGEND)
            return to_inline_svg(drawing, prefix, self.title)
