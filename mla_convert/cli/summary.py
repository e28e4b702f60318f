"""Builds the result tables that `run`, `demo` and `evaluate` print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluate.text import change_text, times_training
from ..sizes import format_bytes


def read_report(path: Path) -> dict[str, Any]:
    """Read `report.json` of a finished run."""
    report: dict[str, Any] = json.loads((path / "report.json").read_text(encoding="utf-8"))
    return report


def result_of(path: Path) -> dict[str, Any]:
    """What `--json` prints of a finished run: its metrics and the paths of its files."""
    report = read_report(path)
    figures = {
        key: report.get(key)
        for key in (
            "dense_scalars_per_token",
            "latent_scalars_per_token",
            "reduction",
            "dense_cache_bytes",
            "latent_cache_bytes",
            "clips",
            "teacher_loss",
            "converted_loss",
            "student_loss",
            "loss_increase",
            "velocity_rel_error",
            "attention_rel_error",
            "accuracy",
            "seconds",
            "not_finite",
        )
        if report.get(key) is not None
    }
    files = {name: str(path / name) for name in ("checkpoint", "report.json", "report.html")}
    return {"name": report["name"], **figures, "run": str(path), "files": files | {"videos": videos_of(path)}}


def videos_of(path: Path) -> list[str]:
    """Paths of the sample videos of a run."""
    return [str(video) for video in sorted((path / "samples").glob("*.mp4"))]


def run_table(path: Path) -> Table:
    """Tabulate the metrics of a finished run for the terminal."""
    report = read_report(path)
    table = Table(title=f"{report['name']}: {report['source']} converted", title_justify="left")
    table.add_column("")
    for heading in ("dense teacher", "converted", "distilled"):
        table.add_column(heading, justify="right")
    latent = f"{report['latent_scalars_per_token']:,g}"
    table.add_row("cached scalars per token per layer", f"{report['dense_scalars_per_token']:,g}", latent, latent)
    reduction = change_text(-report["reduction"], 3)
    table.add_row("  against dense", "", reduction, reduction)
    cache = format_bytes(report["latent_cache_bytes"])
    window = f"{report['plan']['frames']} frames"
    table.add_row(f"cache of one stream ({window})", format_bytes(report["dense_cache_bytes"]), cache, cache)
    losses = [report["teacher_loss"], report["converted_loss"], report["student_loss"]]
    table.add_row(_loss_of(report), *(_format(loss, ".4f") for loss in losses))
    increases = [_format(_increase(loss, losses[0]), "+.2%") for loss in losses[1:]]
    table.add_row("  against the teacher", "", *increases)
    for length, (teacher, student) in _accuracies(report):
        table.add_row(_recognized(length), teacher, "", student)
    table.caption = "\n".join(_footer(path, report["seconds"]))
    table.caption_justify = "left"
    return table


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """Tabulate the metrics of `evaluate` for the terminal."""
    table = Table("", title=f"against {report['source']}", title_justify="left")
    for heading in ("teacher", "student"):
        table.add_column(heading, justify="right")
    scalars = [f"{report[f'{name}_scalars_per_token']:,g}" for name in ("dense", "latent")]
    table.add_row("cached scalars per token per layer", *scalars)
    table.add_row("cache of one stream", *(format_bytes(report[f"{name}_cache_bytes"]) for name in ("dense", "latent")))
    table.add_row(_loss_of(report), *(_format(report[f"{name}_loss"], ".4f") for name in ("teacher", "student")))
    table.add_row("  against the teacher", "", _format(report["loss_increase"], "+.2%"))
    table.add_row("velocity error", "", _format(report["velocity_rel_error"], ".2%"))
    for length, pair in _accuracies(report):
        table.add_row(_recognized(length), *pair)
    return table


def _format(value: float | None, spec: str) -> str:
    """Format a number; None becomes "not finite", because reports store numbers that are not finite as null."""
    return "not finite" if value is None else format(value, spec).replace("%", " %")


def _loss_of(report: Mapping[str, Any]) -> str:
    """Name the row of held-out losses, with the number of clips."""
    clips = report["clips"]
    return f"held-out loss ({clips:,} clip{'' if clips == 1 else 's'})"


def _increase(loss: float | None, teacher: float | None) -> float | None:
    return loss / teacher - 1 if loss is not None and teacher else None


def _recognized(length: str) -> str:
    return f"digits recognized at {'the' if length == '1x' else f'{length} the'} training length"


def _accuracies(report: Mapping[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    accuracy = report.get("accuracy") or {}
    return [
        (length, (f"{100 * accuracy['teacher'][length]:.0f} %", f"{100 * accuracy['student'][length]:.0f} %"))
        for length in sorted(accuracy.get("teacher") or {}, key=times_training)
    ]


def _footer(path: Path, seconds: Mapping[str, float]) -> list[str]:
    spent = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    lines = [f"seconds: {spent}; {seconds['total']:.0f} in total", f"checkpoint: {path / 'checkpoint'}"]
    lines.append(f"report:     {path / 'report.html'}")
    videos = videos_of(path)
    if videos:
        lines.append(f"video:      {videos[0]}" + (f" and {len(videos) - 1} more" if len(videos) > 1 else ""))
    return lines
