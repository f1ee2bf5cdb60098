"""Figures with their errors, and the labels of plots: short, unique, and clear of each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4edge.report.labels import shorten
from phi4edge.report.numbers import with_error
from phi4edge.report.plots import SizePlot, SizePoint
from phi4edge.report.svg import place_labels


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (0.13412, 0.00304, "0.1341 ± 0.0030"),
        (26.2123, 0.4512, "26.21 ± 0.45"),
        (80.2, 0.6, "80.20 ± 0.60"),
        (0.0473, 0.0046, "0.0473 ± 0.0046"),
        (1234.5, 32.0, "1,234 ± 32"),
        (104857.2, None, "104,857"),
        (1.84e-4, 4.4e-6, "1.840e−4 ± 4.4e−6"),
        (-0.0001, 0.002, "−0.0001 ± 0.0020"),
        (9.99996, None, "10.00"),
        (22.98, 0.0004, "22.98 ± 0.0004"),
        (100.0, 0.0, "100.0 ± 0"),
        (1.0, 9.9e-9, "1.000 ± 1e−8"),
        (0.0, None, "0"),
    ],
)
def test_figures_and_their_errors_end_at_one_place(value: float, se: float | None, text: str) -> None:
    assert with_error(value, se) == text


@given(
    st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), max_size=25),
    st.floats(10, 120),
)
def test_labels_never_overlap_each_other_or_the_points(points: list[tuple[float, float]], width: float) -> None:
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    inside = (0.0, 0.0, 400.0, 300.0)
    places = [p for p in place_labels(points, [(width, 9.0)] * len(points), marks, inside) if p is not None]
    for i, a in enumerate(places):
        assert inside[0] <= a[0] <= a[2] <= inside[2]
        assert inside[1] <= a[1] <= a[3] <= inside[3]
        for b in [*places[:i], *marks]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_every_label_of_a_crowded_plot_finds_a_place() -> None:
    points = tuple(SizePoint(f"q4_0-variant-{i}", 102.7 + i / 20, 0.2 + i / 100, 0.005, "other") for i in range(8))
    svg = SizePlot(points, 8e-9, ()).draw("p")
    assert all(f">{point.label}<" in svg for point in points)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["m-q4_0-gptq.gguf", "m-q4_0-rtn.gguf", "m-q8_0.gguf"], ["q4_0-gptq", "q4_0-rtn", "q8_0"]),
        (["alone.gguf"], ["alone"]),
        (["a.gguf", "a.onnx"], ["a.gguf", "a.onnx"]),
        (["m-a.gguf", "m-.gguf"], ["m-a", "m-"]),
        (["x" * 40 + ".gguf", "y.gguf"], ["x" * 13 + "…" + "x" * 13, "y"]),
    ],
)
def test_short_labels_stay_unique(names: list[str], short: list[str]) -> None:
    assert shorten(names) == short
