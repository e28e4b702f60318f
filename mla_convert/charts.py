"""Charts with Matplotlib: colors, style and axes, as inline SVG for pages and as PNG for folders.

Drawing functions import Matplotlib: the import is slow, and warns if its cache folder is not writable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib needs colors that it can parse; in an SVG each of these becomes a CSS variable, in a PNG a light color.
INK, MUTED, RULE, TEACHER, STUDENT = "#010101", "#020202", "#030303", "#040404", "#050505"
RUNS = ("#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", TEACHER: "--teacher", STUDENT: "--student"} | {
    color: f"--run-{number}" for number, color in enumerate(RUNS, start=1)
}
LIGHT = {INK: "#1a1e23", MUTED: "#68727d", RULE: "#e3e7eb", TEACHER: "#a4adb7", STUDENT: "#14708a"}
"""The colors of a PNG, those of the pages on a light background."""

SIZE = (5.4, 3.3)
"""Inches of a chart."""
STEPS = [1, 2, 2.5, 5, 10]
# Height of a line of text and width of a digit, as shares of the axes of a chart of SIZE.
_LINE, _DIGIT = 0.075, 0.02
PLAIN: dict[str, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
"""Settings of every chart."""
STYLE: dict[str, Any] = PLAIN | {
    "svg.fonttype": "none",
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.8,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "text.color": INK,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
"""Settings of the charts of reports."""


class Chart:
    """One figure as a context manager: draw into `axes` or the row of `panels`; `svg` is set when the block ends."""

    def __init__(self, name: str, size: tuple[float, float] = SIZE, panels: int = 1) -> None:
        self.name, self.size, self.count = name, size, panels
        self.svg = ""

    def __enter__(self) -> Chart:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        # A separate salt keeps element ids unique among the figures of a page, and the bytes stable.
        self._context = rc_context(STYLE | {"svg.hashsalt": self.name})
        self._context.__enter__()
        self.figure = Figure(figsize=self.size, layout="constrained")
        self.panels: list[Axes] = [self.figure.add_subplot(1, self.count, n + 1) for n in range(self.count)]
        self.axes = self.panels[0]
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            buffer = io.StringIO()
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            self.svg = _themed(buffer.getvalue())
        self._context.__exit__(*error)


def _themed(svg: str) -> str:
    """Return only the `<svg>` element, scalable, with CSS variables as colors and the page's typeface."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*" width="[^"]*"', r"\1\2", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r'<defs>\s*<style.*?</style>\s*</defs>| transform="rotate\(-0 [^"]*"', "", svg, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


@contextmanager
def png(
    path: Path, style: Mapping[str, Any], dpi: int, size: tuple[float, float] = SIZE, panels: int = 1
) -> Iterator[list[Axes]]:
    """Yield `panels` axes of `size` side by side, and write them to `path` when the block ends.

    `style` holds settings of Matplotlib in the colors of this module. Equal data gives equal bytes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        key: LIGHT.get(value, value) if isinstance(value, str) else value for key, value in style.items()
    }
    with rc_context(settings):
        figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
        yield [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
        # Leave out the version of Matplotlib so that equal data gives equal bytes.
        figure.savefig(path, dpi=dpi, metadata={"Software": None})


def moving_average(
    steps: Sequence[float], values: Sequence[float], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The means of `width` neighboring points of a line, in both directions: shorter by `width - 1` points."""
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, mode="valid"), np.convolve(values, kernel, mode="valid")


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write a label, given as (y, text, color), right of the axes at the end of each line, apart from each other.

    Call it when scale and limits of the axes are set.
    """
    places = ax.transAxes.inverted().transform([ax.transData.transform((ax.get_xlim()[1], y)) for y, _, _ in ends])
    order = sorted(range(len(ends)), key=lambda index: float(places[index][1]))
    heights = [_LINE * (1 + ends[index][1].count("\n")) for index in order]
    bottom, tops = 0.0, []
    for index, height in zip(order, heights, strict=True):
        bottom = max(bottom, float(places[index][1]) - height / 2) + height
        tops.append(bottom)
    # Those that were pushed above the axes move down, and push down what is below them.
    limit = 1 + _LINE / 2
    for place in reversed(range(len(tops))):
        tops[place] = min(tops[place], limit)
        limit = tops[place] - heights[place]
    for index, height, top in zip(order, heights, tops, strict=True):
        _, text, color = ends[index]
        ax.annotate(
            text, (1, top - height / 2), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            color=color, va="center", linespacing=1.1,
        )  # fmt: skip


def ticks_at(ax: Axes, values: Sequence[float]) -> None:
    """Set the ticks of the x axis at `values`, as far as their labels do not touch; call it when its limits are set."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shown: list[float] = []
    end = -1.0
    for value in sorted(set(values)):
        place = float(ax.transAxes.inverted().transform(ax.transData.transform((value, 1)))[0])
        half = _DIGIT * len(f"{value:,.0f}") / 2
        if place - half > end:
            shown.append(value)
            end = place + half + _DIGIT
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())


def layer_bars(ax: Axes, values: Sequence[float], color: str) -> None:
    """Draw a bar for each layer; NaN gets no bar."""
    ax.bar(range(len(values)), values, width=min(0.72, 0.12 * len(values)), color=color)
    ax.set_xlim(-0.6, len(values) - 0.4)
    layer_axis(ax)


def layer_axis(ax: Axes, label: str = "layer") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def noise_axis(ax: Axes) -> None:
    ax.set_xlim(0, 1)
    ax.set_xlabel("t (0 clean, 1 pure noise)")


def step_axis(ax: Axes, steps: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlabel("step")
    ax.set_xlim(0, max(steps) * 1.02 or 1)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))


def percent_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def log_axis_where_wide(ax: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis for positive values that span more than a factor of eight."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(values) > 0 and max(values) > 8 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
