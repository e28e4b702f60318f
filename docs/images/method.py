"""The figures of docs/how-it-works.md: `python docs/images/method.py` writes `method-*.svg` beside itself."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from mla_convert.charts import INK, MUTED, RULE, RUNS, STUDENT, TEACHER, Chart

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))
import plots  # noqa: E402

KEY, VALUE, LATENT, SHARED = RUNS[2], TEACHER, STUDENT, RUNS[1]
SMALL = 9.5


def box(ax: Axes, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
    """A frame with its name in the middle."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=color, linewidth=1.8))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=SMALL, color=INK)


def arrow(ax: Axes, start: tuple[float, float], stop: tuple[float, float], bend: float = 0.0) -> None:
    """An arrow, bent to one side."""
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(
            start, stop, arrowstyle="-|>", mutation_scale=9, color=MUTED, linewidth=1.1, connectionstyle=style
        )
    )


def canvas(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_axis_off()


def row() -> str:
    """What one token leaves in the cache of one layer of Wan2.1-1.3B, to scale."""
    with Chart("method row", (9, 1.75)) as chart:
        ax = chart.axes
        canvas(ax, 3400, 620)
        for head in range(12):
            for part, color in enumerate((KEY, VALUE)):
                ax.add_patch(Rectangle((head * 128 + part * 1536, 340), 122, 120, facecolor=color, edgecolor="none"))
        ax.text(768, 500, "keys of 12 heads, 128 channels each", ha="center", fontsize=SMALL, color=INK)
        ax.text(2304, 500, "values of 12 heads", ha="center", fontsize=SMALL, color=INK)
        ax.text(3100, 400, "3,072", va="center", fontsize=11, color=INK)
        ax.add_patch(Rectangle((0, 60), 192, 120, facecolor=LATENT, edgecolor="none"))
        ax.add_patch(Rectangle((198, 60), 32, 120, facecolor=SHARED, edgecolor="none"))
        ax.text(270, 120, "224: latent of 192, shared rotary key of 32", va="center", fontsize=SMALL, color=INK)
    return chart.svg


def window() -> str:
    """Which keys a chunk sees, and in which form, while it is denoised."""
    with Chart("method window", (9, 2.2)) as chart:
        ax = chart.axes
        canvas(ax, 20, 5.2)
        ax.set_ylim(0.6, 5.2)
        names = {0: LATENT, 1: RULE, 2: RULE, 3: LATENT, 4: LATENT, 5: KEY}
        for place, color in names.items():
            for frame in range(3):
                ax.add_patch(
                    Rectangle((0.4 + 3.1 * place + frame * 0.95, 1.9), 0.87, 0.87, facecolor=color, edgecolor="none")
                )
        for place, text in ((0, "sink"), (1.5, "left the window"), (3.5, "history, from the cache"), (5, "own chunk")):
            ax.text(0.4 + 3.1 * place + 1.4, 3.05, text, ha="center", fontsize=SMALL, color=INK)
        for place, text in ((0, "latents"), (3.5, "latents"), (5, "dense keys and values,\nnever cached")):
            ax.text(0.4 + 3.1 * place + 1.4, 1.65, text, ha="center", va="top", fontsize=SMALL, color=MUTED)
        for place, bend in ((0.9, 0.14), (3.9, 0.22)):
            arrow(ax, (17.2, 3.6), (1.4 + 3.1 * place, 3.6), bend)
        ax.text(9.2, 4.75, "queries of the chunk look back", ha="center", fontsize=SMALL, color=MUTED)
    return chart.svg


def layouts() -> str:
    """Where the position of a cached token lives in each layout."""
    with Chart("method layouts", (9, 5.2)) as chart:
        ax = chart.axes
        canvas(ax, 20, 11.9)
        heads = ("what is cached", "what becomes of it when it is read")
        for x, text in zip((3.6, 10.2), heads, strict=True):
            ax.text(x, 11.4, text, fontsize=SMALL, color=MUTED)
        rows = (
            ("decoupled", True, ("unrotated keys and values of each head", None), "one shared key: rotated in t, h, w"),
            (
                "derived",
                False,
                ("unrotated keys and values of each head", None),
                "shared keys made of the latent: rotated in t, h, w",
            ),
            ("baked", True, ("keys rotated in h and w already, and values", None), "one shared key: rotated in t"),
            ("rotate_on_read", False, ("keys and values of each head", "every head's keys: rotated in t, h, w"), None),
        )
        for index, (name, cached_key, (restored, turned), shared) in enumerate(rows):
            y = 8.95 - 2.75 * index
            ax.text(0.2, y + 0.6, name, va="center", fontsize=11, color=INK)
            box(ax, 3.6, y, 2.6, 1.2, LATENT, "latent")
            if cached_key:
                box(ax, 6.3, y, 1.5, 1.2, SHARED, "key")
            arrow(ax, (8.0, y + 0.95), (10.0, y + 1.2))
            box(ax, 10.2, y + 0.85, 9.4, 0.85, VALUE, restored)
            arrow(ax, (8.0, y + 0.35), (10.0, y + 0.1))
            box(ax, 10.2, y - 0.45, 9.4, 0.85, SHARED if shared else KEY, shared or turned or "")
    return chart.svg


if __name__ == "__main__":
    for name, draw in (("row", row), ("window", window), ("layouts", layouts)):
        plots.save(draw(), HERE / f"method-{name}.svg")
