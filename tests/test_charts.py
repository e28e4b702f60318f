"""Labels and ticks of charts do not touch each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mla_convert.charts import label_ends, ticks_at


def boxes(figure: Figure, texts: Any) -> list[Any]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [text.get_window_extent(canvas.get_renderer()) for text in texts]


@pytest.mark.parametrize(
    "ys", [[1.0, 1.0, 1.0, 1.0, 1.0], [100.0, 99.0, 98.0], [0.01, 0.0101, 50.0], [0.01, 1.0, 100.0]]
)
def test_labels_stand_at_the_ends_of_their_lines_and_apart(ys: list[float]) -> None:
    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    ax = figure.add_subplot()
    ax.set_yscale("log")
    ax.set_ylim(0.01, 100)
    names = [f"line {index},\nof two" if index == 1 else f"line {index}" for index in range(len(ys))]
    label_ends(ax, [(y, name, "black") for y, name in zip(ys, names, strict=True)])
    found = boxes(figure, sorted(ax.texts, key=lambda text: text.get_text()))
    window = ax.get_window_extent()
    order = sorted(range(len(ys)), key=lambda index: found[index].y0)
    assert [ys[index] for index in order] == sorted(ys)
    for low, high in pairwise(order):
        assert found[low].y1 <= found[high].y0 + 1
    assert all(box.x0 > window.x1 for box in found)
    assert min(box.y0 for box in found) > window.y0 - 20 and max(box.y1 for box in found) < window.y1 + 20
    if ys == [0.01, 1.0, 100.0]:
        middle = found[1]
        assert abs((middle.y0 + middle.y1) / 2 - (window.y0 + window.y1) / 2) < 5


@pytest.mark.parametrize(("scale", "last", "shown"), [("linear", 64, 7), ("log", 384, 5)])
def test_ticks_are_at_the_values_whose_labels_have_room(scale: str, last: int, shown: int) -> None:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    ax = figure.add_subplot()
    ax.set_xscale(scale)
    ax.set_xlim(1, last)
    ranks = [8, 16, 24, 28, 32]
    ticks_at(ax, [1, *ranks, last])
    found = boxes(figure, ax.get_xticklabels())
    ticks = [int(text.get_text()) for text in ax.get_xticklabels()]
    assert set(ticks) <= {1, *ranks, last} and len(ticks) >= shown
    assert all(left.x1 < right.x0 for left, right in pairwise(found))
