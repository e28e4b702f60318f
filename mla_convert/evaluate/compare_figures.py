"""Draws the curves of several runs in one chart, each in its run's color; the page has the legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..charts import (
    RUNS,
    TEACHER,
    Chart,
    layer_axis,
    log_axis_where_wide,
    moving_average,
    noise_axis,
    percent_axis,
    step_axis,
)
from .digits_section import plot_recognition, recognition_axes
from .figures import curve_of

Report = Mapping[str, Any]


def heldout_loss(reports: Sequence[Report], teacher: float | None) -> str:
    """Plot the held-out loss of each run by step, as SVG, with the `teacher` level as a dashed line."""
    with Chart("compared heldout") as chart:
        ax = chart.axes
        ends = [1.0]
        for report, color in zip(reports, RUNS, strict=False):
            steps, values, _ = curve_of(report.get("curves") or [], "heldout_loss")
            if not values:
                continue
            ax.plot(steps, values, color=color, marker="o", markersize=4, clip_on=False)
            ends.append(steps[-1])
        if teacher is not None:
            ax.axhline(teacher, color=TEACHER, linewidth=1.5, dashes=(5, 3))
        ax.margins(y=0.1)
        step_axis(ax, ends)
    return chart.svg


def training_loss(reports: Sequence[Report]) -> str:
    """Plot the moving average of each run's training loss, as SVG."""
    with Chart("compared training") as chart:
        ax = chart.axes
        ends, everything = [1.0], []
        for report, color in zip(reports, RUNS, strict=False):
            steps, values, _ = curve_of(report.get("curves") or [], "loss")
            if not values:
                continue
            at, smooth = moving_average(steps, values, max(1, len(values) // 20))
            ax.plot(at, smooth, color=color)
            everything += list(smooth)
            ends.append(steps[-1])
        log_axis_where_wide(ax, everything)
        step_axis(ax, ends)
    return chart.svg


def error_by_layer(reports: Sequence[Report]) -> str:
    """Plot the relative error of each layer's attention output, as SVG."""
    with Chart("compared layers") as chart:
        ax = chart.axes
        for report, color in zip(reports, RUNS, strict=False):
            errors = [np.nan if e is None else 100 * e for e in report.get("attention_rel_error") or []]
            ax.plot(range(len(errors)), errors, color=color, marker="o", markersize=5, clip_on=False)
        layer_axis(ax)
        percent_axis(ax)
    return chart.svg


def error_by_timestep(reports: Sequence[Report]) -> str:
    """Plot the relative velocity error at noise levels t in [0, 1], as SVG."""
    with Chart("compared timesteps") as chart:
        ax = chart.axes
        for report, color in zip(reports, RUNS, strict=False):
            points = report.get("velocity_rel_error_by_timestep") or []
            known = sorted((float(t), 100 * float(error)) for t, error in points if error is not None)
            ax.plot([t for t, _ in known], [e for _, e in known], color=color, marker="o", markersize=4)
        noise_axis(ax)
        percent_axis(ax)
    return chart.svg


def recognition_by_frame(benches: Sequence[Mapping[str, Any] | None]) -> str:
    """Plot the share of videos that show their digit in each frame, for every student and the first teacher, as SVG."""
    with Chart("compared recognition") as chart:
        ax = chart.axes
        known = [bench for bench in benches if bench is not None]
        curves = [(known[0]["digit_accuracy_by_frame"]["teacher"], TEACHER)]
        for bench, color in zip(benches, RUNS, strict=False):
            if bench is not None:
                curves.append((bench["digit_accuracy_by_frame"]["student"], color))
        for by_frame, color in curves:
            plot_recognition(ax, by_frame, color)
        recognition_axes(ax, known[0]["clip_frames"], max(len(by_frame) for by_frame, _ in curves))
    return chart.svg
