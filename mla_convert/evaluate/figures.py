"""Draws the report's charts as inline SVG; colors and typeface come from the page's style sheet."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..charts import (
    MUTED,
    RULE,
    STEPS,
    STUDENT,
    TEACHER,
    Chart,
    layer_bars,
    log_axis_where_wide,
    moving_average,
    noise_axis,
    percent_axis,
    step_axis,
)
from ..sizes import format_bytes

# Drawing functions import Matplotlib: the import is slow, and warns if its cache folder is not writable.
if TYPE_CHECKING:
    from matplotlib.axes import Axes


def teacher_level(curves: Sequence[Mapping[str, Any]]) -> float | None:
    """The teacher's held-out loss on the clips and noise of the curves; None if no stage measured it."""
    levels = [row["teacher_heldout_loss"] for row in curves if row.get("teacher_heldout_loss") is not None]
    return levels[0] if levels else None


def heldout_loss(curves: Sequence[Mapping[str, Any]]) -> str:
    """Plot the held-out loss by distillation step, as SVG, with the teacher's as a line.

    It leaves out the losses of the evaluation, which are measured with different noise.
    """
    steps, values, bounds = curve_of(curves, "heldout_loss")
    teacher = teacher_level(curves)
    with Chart("heldout") as chart:
        ax = chart.axes
        _stages(ax, bounds)
        ax.plot(steps, values, color=STUDENT, marker="o", markersize=4, clip_on=False)
        above = teacher is None or values[-1] >= teacher
        beneath_label = [value for step, value in zip(steps, values, strict=True) if step >= 0.65 * steps[-1]]
        clear = max(beneath_label) if above else min(beneath_label)
        _end_label(ax, steps[-1], clear, f"student {values[-1]:.4f}", STUDENT, above)
        if teacher is not None:
            ax.axhline(teacher, color=TEACHER, linewidth=1.5, dashes=(5, 3))
            _end_label(ax, steps[-1], teacher, f"teacher {teacher:.4f}", MUTED, not above)
        ax.margins(y=0.16)
        step_axis(ax, steps)
    return chart.svg


def training_loss(curves: Sequence[Mapping[str, Any]]) -> str:
    """Plot the training loss by step, faint, and its moving average, as SVG."""
    steps, values, bounds = curve_of(curves, "loss")
    with Chart("training") as chart:
        ax = chart.axes
        _stages(ax, bounds)
        # Stages minimize different objectives, so each is averaged separately.
        starts = [int(np.searchsorted(steps, start, side="right")) for _, start in bounds]
        for first, end in itertools.pairwise([*starts, len(steps)]):
            _smoothed(ax, steps[first:end], values[first:end])
        log_axis_where_wide(ax, values)
        step_axis(ax, steps)
    return chart.svg


def cache_by_streams(dense_bytes: float, latent_bytes: float) -> str:
    """Plot the cache bytes of up to 64 streams, dense and latent, as SVG."""
    streams = 64
    with Chart("streams") as chart:
        ax = chart.axes
        for per_stream, name, color, ink in (
            (dense_bytes, "dense", TEACHER, MUTED),
            (latent_bytes, "latent", STUDENT, STUDENT),
        ):
            ax.plot([0, streams], [0, streams * per_stream], color=color)
            _text(ax, 0.97 * streams, 0.97 * streams * per_stream, f"{name}  ", ink, "right", "bottom", (0, 3))
        _memory_axes(ax, streams, streams * dense_bytes)
    return chart.svg


def memory_by_streams(plan: Mapping[str, Any]) -> str:
    """Plot the memory of weights, caches and working memory by number of streams, and a GPU's limit, as SVG.

    `plan` is the object that `plan --json` prints.
    """
    limit = plan["gpu_memory_bytes"]
    fixed = plan["weights_bytes"] + plan["reserved_bytes"]
    streams = max(4, round(1.3 * plan["max_streams_latent"]))
    with Chart("streams") as chart:
        ax = chart.axes
        ax.axhline(limit, color=MUTED, linewidth=1, dashes=(2, 3))
        _text(ax, 0, limit, plan["gpu"], MUTED, "left", "bottom", (4, 4))
        for name, color, ink in (("dense", TEACHER, MUTED), ("latent", STUDENT, STUDENT)):
            per_stream = plan[f"{name}_cache_bytes"] + plan["activation_bytes"]
            fits = plan[f"max_streams_{name}"]
            end = min(streams, (1.2 * limit - fixed) / per_stream)
            ax.plot([0, end], [fixed, fixed + end * per_stream], color=color)
            ax.plot([fits], [fixed + fits * per_stream], color=color, marker="o", markersize=6)
            _text(ax, fits, fixed + fits * per_stream, f"{fits:,} {name}", ink, "left", "top", (7, -3))
        _memory_axes(ax, streams, 1.2 * limit)
    return chart.svg


def error_by_layer(errors: Sequence[float]) -> str:
    """Plot the relative error of each layer's attention output as bars, as SVG; NaN gets no bar."""
    with Chart("layers") as chart:
        layer_bars(chart.axes, [100 * error for error in errors], STUDENT)
        percent_axis(chart.axes)
    return chart.svg


def error_by_timestep(points: Sequence[Sequence[float]]) -> str:
    """Plot the relative velocity error at noise levels t in [0, 1], as SVG."""
    ordered = sorted((float(t), float(error)) for t, error in points)
    with Chart("timesteps") as chart:
        ax = chart.axes
        ax.plot([t for t, _ in ordered], [100 * e for _, e in ordered], color=STUDENT, marker="o", markersize=4)
        noise_axis(ax)
        percent_axis(ax)
    return chart.svg


def curve_of(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float], list[tuple[str, float]]]:
    """The steps and values of `key` over all stages, and `(stage, first step)` of each.

    Stages that count from their own start are placed end to end. A step that does not increase starts a new stage.
    """
    steps: list[float] = []
    values: list[float] = []
    bounds: list[tuple[str, float]] = []
    offset = end = 0.0
    last = -1
    for row in rows:
        stage = str(row.get("stage", ""))
        if not bounds or bounds[-1][0] != stage or row["step"] <= last:
            if row["step"] < end:
                offset = end
            bounds.append((stage, end))
        last = row["step"]
        end = offset + last
        if row.get(key) is not None:
            steps.append(end)
            values.append(float(row[key]))
    return steps, values, bounds


def _smoothed(ax: Axes, steps: Sequence[float], values: Sequence[float]) -> None:
    """Plot a noisy line, faint, under its centered moving average."""
    width = max(1, len(values) // 40)
    ax.plot(steps, values, color=STUDENT, linewidth=1, alpha=0.35 if width > 1 else 1)
    if width > 1:
        ax.plot(*moving_average(steps, values, width), color=STUDENT)


def _stages(ax: Axes, bounds: list[tuple[str, float]]) -> None:
    if len(bounds) < 2:
        return
    for stage, start in bounds:
        if start:
            ax.axvline(start, color=RULE, linewidth=1)
        ax.annotate(
            stage, (start, 1), xycoords=("data", "axes fraction"), xytext=(4, 2), textcoords="offset points",
            fontsize=10, color=MUTED, va="bottom",
        )  # fmt: skip


def _text(
    ax: Axes, x: float, y: float, text: str, color: str, align: str, vertical: str, shift: tuple[float, float]
) -> None:
    """Write text at a data point, moved by `shift` points."""
    ax.annotate(text, (x, y), xytext=shift, textcoords="offset points", color=color, ha=align, va=vertical)


def _end_label(ax: Axes, x: float, y: float, text: str, color: str, above: bool) -> None:
    _text(ax, x, y, text, color, "right", "bottom" if above else "top", (0, 7 if above else -6))


def _memory_axes(ax: Axes, streams: int, top: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlim(0, streams)
    ax.set_ylim(0, top)
    ax.set_xlabel("parallel streams")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_bytes(value, top)))


def _short_bytes(value: float, like: float) -> str:
    number, unit = format_bytes(value, like=like).split()
    return f"{float(number):g} {unit}" if value else "0"
