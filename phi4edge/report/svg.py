"""Matplotlib figures as inline SVG: text stays text, colours follow the page, equal input gives equal bytes.

A figure is drawn in stand-in colours, one for each role; in the SVG they become CSS variables (``var(--ink)``), so that
one drawing serves light and dark. Identifiers get a prefix, because several drawings share the page. Matplotlib is
imported inside functions: the command line starts without it.
"""

from __future__ import annotations

__all__ = ["ROLES", "Box", "Canvas", "canvas", "place_labels", "to_inline_svg"]

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Role → stand-in. Pure black and white are left out: matplotlib writes no colour for the one, and uses both itself.
ROLES = {
    "ink": "#16181a",
    "muted": "#66696c",
    "rule": "#d6d8da",
    "paper": "#fcfcfe",
    "accent": "#0b66a8",
    "contrast": "#c4500a",
    "series-1": "#0072b1",
    "series-2": "#d55e01",
    "series-3": "#009e72",
    "series-4": "#cc79a6",
}
_BY_COLOUR = {colour: f"var(--{role})" for role, colour in ROLES.items()}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_MEASURED_FONT = "DejaVu Sans"  # comes with matplotlib, and is wider than what browsers show instead


def _settings() -> dict[str, Any]:
    ink, muted, rule = ROLES["ink"], ROLES["muted"], ROLES["rule"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "phi4edge",
        "font.family": [_MEASURED_FONT],
        "font.size": 8.0,
        "text.color": ink,
        "text.parse_math": False,  # a name with two dollar signs is a name
        "axes.edgecolor": muted,
        "axes.labelcolor": ink,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.unicode_minus": True,
        "figure.facecolor": "none",
        "figure.dpi": 72.0,  # a pixel is a point, as in the SVG
        "grid.color": rule,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.0,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.size": 0.0,
        "ytick.minor.size": 0.0,
        "xtick.major.size": 3.0,
        "ytick.major.size": 0.0,
        "legend.frameon": False,
        "legend.fontsize": 8.0,
    }


@dataclass(frozen=True)
class Canvas:
    """A figure with one pair of axes."""

    figure: Any
    axes: Any

    def renderer(self) -> Any:
        """Measures text, in points."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        return FigureCanvasAgg(self.figure).get_renderer()  # type: ignore[no-untyped-call, unused-ignore]


@contextmanager
def canvas(width: float, height: float) -> Iterator[Canvas]:
    """A figure of ``width`` × ``height`` points in the page's style, whatever the user's matplotlibrc says."""
    import matplotlib as mpl
    import matplotlib.style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), mpl.rc_context(), mpl.style.context("default"):
        # A script that the measuring font lacks is the browser's to show.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        mpl.rcParams.update(_settings())
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        yield Canvas(figure, figure.add_subplot())


def to_inline_svg(drawing: Canvas, prefix: str, title: str) -> str:
    """The figure as an ``<svg>`` element for an HTML page, without any reference to the outside."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(drawing.figure).print_svg(buffer, metadata=metadata)  # type: ignore[no-untyped-call, unused-ignore]
    root = ElementTree.fromstring(_without_controls(buffer.getvalue()))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {  # type: ignore[misc, unused-ignore]
            name.removeprefix(_XLINK): _attribute(name.removeprefix(_XLINK), value, prefix)
            for name, value in element.attrib.items()
        }
    for name in ("version", "width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _without_controls(text: str) -> str:
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return f"#{prefix}-{value.removeprefix('#')}"
    value = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", value)
    if name != "style":
        return value
    value = re.sub(r"font-family:[^;]*;?\s*|,?\s*'DejaVu Sans'[^;]*", "", value)
    return re.sub(r"#[0-9a-f]{6}", lambda match: _BY_COLOUR.get(match[0], match[0]), value)


Box = tuple[float, float, float, float]  # left, bottom, right, top


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], taken: Sequence[Box], inside: Box
) -> list[Box | None]:
    """A place for a label of each size [width, height] near its point, clear of ``taken`` and of one another.

    Tries the right, the left, above and below, ever further out; None where nothing within ``inside`` is free. All in
    the same units, points on the page.
    """
    placed: list[Box | None] = []
    occupied = list(taken)
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        found = next((b for b in _candidates(x, y, width, height) if _free(b, occupied, inside)), None)
        placed.append(found)
        if found is not None:
            occupied.append(found)
    return placed


def _candidates(x: float, y: float, width: float, height: float) -> Iterator[Box]:
    for gap in (8.0, 12.0, 18.0, 24.0, 34.0, 46.0, 60.0, 76.0):
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            reach = gap * (0.75 if dx and dy else 1.0)
            left = x + dx * reach - (width if dx < 0 else width / 2 if dx == 0 else 0)
            bottom = y + dy * reach - (height if dy < 0 else height / 2 if dy == 0 else 0)
            yield (left, bottom, left + width, bottom + height)


def _free(box: Box, occupied: Sequence[Box], inside: Box) -> bool:
    if box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]:
        return False
    return all(box[2] <= o[0] or o[2] <= box[0] or box[3] <= o[1] or o[3] <= box[1] for o in occupied)
