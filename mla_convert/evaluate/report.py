"""Writes `report.json` and `report.html`, the measurements of one conversion. The page opens offline.

A section of the page appears when the report has its data. The page reads these keys:

    name, source, layout {position, own_chunk, kv_lora_rank, ...}, recipe (YAML text), versions {...}
    dense_scalars_per_token, latent_scalars_per_token, reduction, dense_cache_bytes, latent_cache_bytes
    clips (how many were measured), teacher_loss, student_loss, converted_loss (before distillation), loss_increase
    velocity_rel_error, velocity_rel_error_by_timestep [[t, error], ...] with t in [0, 1]
    attention_rel_error [one per layer], attention_maps (see `attention_maps.py`), by_clip (see `worst_clips.py`)
    accuracy {teacher: {"1x": ...}, student: {...}}, digits_bench (see `digits_bench.py`)
    kernels {teacher, student}: which attention ran, not_finite [keys that became null]
    seconds {convert, distill, evaluate, total}
    vbench {suite, version, seconds, samples, scores {dimension: {score, videos}}, totals, published}
    curves [{stage, step, loss, heldout_loss}, ...], plan (what `plan --json` prints)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..files import write_text
from ..sizes import duration
from . import digits_section, fidelity_section, figures
from .page import render_page
from .samples import Comparison, embed
from .text import (
    DASH,
    bytes_text,
    factor,
    layout_parts,
    length_text,
    percent,
    plain,
    points_text,
    share_text,
    signed,
    times_training,
)
from .vbench_section import vbench_table

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def write_report(folder: Path, report: Mapping[str, Any], comparisons: Sequence[Comparison] = ()) -> Path:
    """Write `report.json` and `report.html` into `folder` and return the page's path.

    Numbers that are not finite become null in the JSON; `not_finite` and the page list them. Equal input
    gives equal bytes. Raises UserError when the disk is full.
    """
    clean = finite(report)
    write_text(folder / REPORT_JSON, json.dumps(clean, indent=2, sort_keys=True, allow_nan=False) + "\n")
    page = folder / REPORT_HTML
    write_text(page, render_html(clean, comparisons))
    return page


def finite(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as plain JSON values; `not_finite` lists the paths of non-finite numbers, which become None."""
    lost: list[str] = []

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {str(k): walk(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [walk(v, f"{path}[{i}]") for i, v in enumerate(value)]
        if hasattr(value, "tolist"):
            return walk(value.tolist(), path)
        if isinstance(value, float) and not math.isfinite(value):
            lost.append(path)
            return None
        if isinstance(value, Path):
            return str(value)
        return value

    clean: dict[str, Any] = walk(report, "")
    if lost:
        clean["not_finite"] = [*clean.get("not_finite", []), *lost]
    return clean


def render_html(report: Mapping[str, Any], comparisons: Sequence[Comparison] = ()) -> str:
    """The HTML page of a report whose numbers are finite or None."""
    return render_page(
        "report.html.j2",
        title=_title(report),
        subtitle=layout_parts(report.get("layout") or {}),
        verdict=_verdict(report),
        not_finite=report.get("not_finite", []),
        tiles=_tiles(report),
        rows=_rows(report),
        seconds=_seconds(report.get("seconds") or {}),
        bars=_bars(report),
        charts=_charts(report),
        bench=digits_section.tables(report["digits_bench"]) if _has(report, "digits_bench") else [],
        comparisons=[embed(comparison) for comparison in comparisons],
        heads=fidelity_section.worst_heads(report.get("attention_maps") or []),
        vbench=vbench_table(report["vbench"]) if _has(report, "vbench") else None,
        worst=fidelity_section.worst_clips(report["by_clip"]) if _has(report, "by_clip") else None,
        layout={key: plain(value) for key, value in (report.get("layout") or {}).items()},
        recipe=report.get("recipe") or "",
        versions={key: str(value) for key, value in (report.get("versions") or {}).items()},
    )


def _has(report: Mapping[str, Any], *keys: str) -> bool:
    return all(report.get(key) is not None for key in keys)


def _title(report: Mapping[str, Any]) -> str:
    return f"Conversion of {report['source']}" if report.get("source") else "Conversion report"


def _verdict(report: Mapping[str, Any]) -> str:
    if not _has(report, "dense_scalars_per_token", "latent_scalars_per_token", "reduction"):
        return ""
    saved = report["reduction"]
    text = (
        f"Each layer of the converted model caches {report['latent_scalars_per_token']:,g} numbers per token; its "
        f"teacher caches {report['dense_scalars_per_token']:,g}. That is {percent(abs(saved))} "
        f"{'less' if saved >= 0 else 'more'} memory"
    )
    increase = report.get("loss_increase")
    if increase is None:
        return text + "."
    side = "above" if increase >= 0 else "below"
    return f"{text}. The held-out loss is {percent(abs(increase))} {side} the teacher's."


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline numbers at the top of the page."""
    tiles = []
    if _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        dense, latent = report["dense_cache_bytes"], report["latent_cache_bytes"]
        note = f"{bytes_text(latent)} instead of {bytes_text(dense)}"
        times, word = factor(dense / latent, "smaller", "larger")
        tiles.append({"value": f"{times:.1f}×", "label": f"{word} cache", "note": note})
    if _has(report, "loss_increase"):
        note = ""
        if _has(report, "teacher_loss", "student_loss"):
            note = f"{report['student_loss']:.4f}, teacher {report['teacher_loss']:.4f}"
        tiles.append({"value": signed(report["loss_increase"]), "label": "held-out loss", "note": note})
    for length, teacher, student in _accuracies(report)[-1:]:
        if student is not None:
            note = f"teacher {percent(teacher)}" if teacher is not None else ""
            tiles.append(
                {"value": percent(student), "label": f"digits recognized at {length_text(length)}", "note": note}
            )
    total = (report.get("seconds") or {}).get("total")
    if total is not None:
        tiles.append({"value": duration(total), "label": "from source to report", "note": ""})
    return tiles


def _rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the comparison table: name, teacher, student, change."""
    rows: list[dict[str, str]] = []

    def add(name: str, teacher: str, student: str, change: str = "") -> None:
        rows.append({"name": name, "teacher": teacher, "student": student, "change": change})

    if _has(report, "dense_scalars_per_token", "latent_scalars_per_token"):
        dense, latent = report["dense_scalars_per_token"], report["latent_scalars_per_token"]
        add("Cached scalars per token per layer", f"{dense:,g}", f"{latent:,g}", signed(latent / dense - 1))
    if _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        dense, latent = report["dense_cache_bytes"], report["latent_cache_bytes"]
        add("Cache of one stream", bytes_text(dense), bytes_text(latent), signed(latent / dense - 1))
    plan = report.get("plan")
    if plan:
        dense, latent = plan["max_streams_dense"], plan["max_streams_latent"]
        change = f"{latent / dense:.1f}×" if dense else ""
        add(f"Streams on {plan['gpu']}", f"{dense:,}", f"{latent:,}", change)
    teacher_loss = report.get("teacher_loss")
    for name, key in (("Loss before distillation", "converted_loss"), ("Held-out loss", "student_loss")):
        if report.get(key) is not None:
            loss = report[key]
            change = signed(loss / teacher_loss - 1) if teacher_loss else ""
            add(name, f"{teacher_loss:.4f}" if teacher_loss else DASH, f"{loss:.4f}", change)
    if _has(report, "velocity_rel_error"):
        add("Velocity error", DASH, percent(report["velocity_rel_error"]))
    for length, teacher, student in _accuracies(report):
        change = "" if teacher is None or student is None else points_text(student - teacher)
        add(f"Digits recognized at {length_text(length)}", share_text(teacher), share_text(student), change)
    return rows


def _accuracies(report: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """`(length, teacher, student)` accuracies from the shortest rollout to the longest."""
    accuracy = report.get("accuracy") or {}
    teacher, student = accuracy.get("teacher") or {}, accuracy.get("student") or {}
    lengths = sorted({*teacher, *student}, key=times_training)
    return [(length, teacher.get(length), student.get(length)) for length in lengths]


def _seconds(seconds: Mapping[str, float]) -> str:
    parts = [f"{name} {duration(value)}" for name, value in seconds.items() if name != "total" and value is not None]
    if seconds.get("total") is not None:
        parts.append(f"{duration(seconds['total'])} in total")
    return ", ".join(parts)


def _bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        return []
    dense, latent = report["dense_cache_bytes"], report["latent_cache_bytes"]
    whole = max(dense, latent)
    return [
        {"name": "dense", "kind": "teacher", "share": 100 * dense / whole, "value": bytes_text(dense)},
        {"name": "latent", "kind": "student", "share": 100 * latent / whole, "value": bytes_text(latent)},
    ]


def _charts(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The charts by section: `{"distillation": [{title, note, svg}], ...}`."""
    charts: dict[str, list[dict[str, Any]]] = {"distillation": [], "memory": [], "error": [], "bench": []}

    def add(section: str, title: str, note: str, svg: str) -> None:
        charts[section].append({"title": title, "note": note, "svg": Markup(svg)})

    curves = report.get("curves") or []
    if any(row.get("heldout_loss") is not None for row in curves):
        note = "On held-out clips, with the same noise at every point."
        if _has(report, "student_loss"):
            note += " The losses in the table differ because they use other noise on the same clips."
        add("distillation", "Held-out loss", note, figures.heldout_loss(curves))
    if any(row.get("loss") is not None for row in curves):
        add("distillation", "Training loss", "The objective that the stage minimizes.", figures.training_loss(curves))
    if _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        if (report.get("plan") or {}).get("max_streams_latent"):
            note = "Weights, caches and working memory (computed, not measured)."
            add("memory", "Memory by number of streams", note, figures.memory_by_streams(report["plan"]))
        else:
            svg = figures.cache_by_streams(report["dense_cache_bytes"], report["latent_cache_bytes"])
            add("memory", "Cache by number of streams", "Each stream caches a full window.", svg)
    layers = [math.nan if error is None else error for error in report.get("attention_rel_error") or []]
    if not np.isnan(layers).all():
        worst = int(np.nanargmax(layers))
        note = f"Mean {percent(float(np.nanmean(layers)))}, worst {percent(layers[worst])} in layer {worst}."
        add("error", "Attention output by layer", note, figures.error_by_layer(layers))
    points = [(t, error) for t, error in report.get("velocity_rel_error_by_timestep") or [] if error is not None]
    if points:
        note = "Difference from the teacher's velocity, relative to the magnitude of the teacher's."
        add("error", "Velocity by noise level", note, figures.error_by_timestep(points))
    if report.get("attention_maps"):
        note = "Share of a head's attention that goes to different tokens than in the teacher (total variation)."
        add("error", "Attention maps by layer", note, fidelity_section.map_chart(report["attention_maps"]))
    if _has(report, "digits_bench"):
        note = "Share of rollouts that show the prompted digit in each frame."
        add("bench", "Recognition over time", note, digits_section.recognition_by_frame(report["digits_bench"]))
    return charts
