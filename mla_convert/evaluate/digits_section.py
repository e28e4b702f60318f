"""Builds the Digits-Bench section of the report: one table per length, and recognition over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..charts import MUTED, STUDENT, TEACHER, Chart, label_ends, moving_average, percent_axis
from .text import DASH, SPACE, digits_text, points_text, times_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "digit_accuracy": ("Frames that show the prompted digit", "percent"),
    "motion_accuracy": ("Frames with the digit in its place", "percent"),
    "bounce_accuracy": ("Right place after a bounce", "percent"),
    "subject_consistency": ("Subject consistency", "number"),
    "temporal_flickering": ("Temporal flickering (1: none)", "number"),
    "motion_smoothness": ("Acceleration, pixels per frame²", "number"),
    "dynamic_degree": ("Speed, pixels per frame", "number"),
    "sharpness": ("Sharpness", "number"),
    "frechet_distance": ("Fréchet distance to real videos", "number"),
}
SOURCES = ("real", "teacher", "student")
ROUNDING = 1e-9
"""Magnitudes up to this are rounding errors and are shown as 0."""


def tables(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per length: `title`, and `rows` with a `name` and one cell (`cell`) for each of SOURCES."""
    found = []
    for length in sorted(bench["lengths"], key=times_training):
        by_source = bench["lengths"][length]
        rows = [
            {"name": name, "cells": [cell(by_source[source].get(metric), kind) for source in SOURCES]}
            for metric, (name, kind) in METRICS.items()
        ]
        rows.append(
            {
                "name": "Drift of recognition, end minus beginning",
                "cells": [cell(by_source[source]["drift"]["digit_accuracy"], "points") for source in SOURCES],
            }
        )
        found.append({"title": length_title(bench, length), "rows": rows})
    return found


def length_title(bench: Mapping[str, Any], length: str) -> str:
    """Say how long the videos of a length such as `8x` are."""
    times = times_training(length)
    return f"{bench['clip_frames'] * times:g} frames ({times:g} × the training length)"


def recognition_by_frame(bench: Mapping[str, Any]) -> str:
    """Plot the share of videos that show their digit in each frame, as SVG."""
    by_frame: Mapping[str, Sequence[float]] = bench["digit_accuracy_by_frame"]
    with Chart("recognition") as chart:
        ax = chart.axes
        ends: list[tuple[float, str, str]] = []
        for source, color, ink in (("teacher", TEACHER, MUTED), ("student", STUDENT, STUDENT)):
            ends.append((plot_recognition(ax, by_frame[source], color), source, ink))
        recognition_axes(ax, bench["clip_frames"], len(by_frame["teacher"]))
        label_ends(ax, ends)
    return chart.svg


def plot_recognition(ax: Axes, by_frame: Sequence[float], color: str) -> float:
    """Plot the moving average of shares by frame, in percent, and return where it ends."""
    values = [100 * share for share in by_frame]
    frames, smooth = moving_average(range(1, len(values) + 1), values, max(1, len(values) // 64))
    ax.plot(frames, smooth, color=color)
    return float(smooth[-1])


def recognition_axes(ax: Axes, clip_frames: int, frames: int) -> None:
    """Axes for shares by frame up to `frames`, with a line at the training length of `clip_frames`."""
    ax.axvline(clip_frames, color=MUTED, linewidth=1, dashes=(2, 3))
    ax.set_xlim(1, frames)
    ax.set_ylim(0, 105)
    ax.set_xlabel("frame (dashed: the training length)")
    percent_axis(ax)


def cell(value: Mapping[str, float | None] | None, kind: str) -> dict[str, str]:
    """A table cell: `mean`, and `range`, its 95 % interval, or "" without one."""
    if value is None or value["mean"] is None:
        return {"mean": DASH, "range": ""}
    mean = _text(value["mean"], kind)
    low, high = ("" if end is None else _text(end, kind) for end in (value["low"], value["high"]))
    return {"mean": mean, "range": "" if low == high else f"{low} to {high}"}


def _text(value: float, kind: str) -> str:
    if kind == "percent":
        return f"{100 * value:.1f}{SPACE}%"
    if kind == "points":
        return points_text(value)
    return digits_text(value, 3) if abs(value) > ROUNDING else "0"
