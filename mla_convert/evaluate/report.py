"""`report.json` and `report.html`: the evidence of one conversion, in one file that opens offline.

A section of the page appears when its data is in the report. The keys that it knows:

    source, layout {position, own_chunk, kv_lora_rank, ...}, recipe (YAML text), versions {...}
    dense_scalars_per_token, latent_scalars_per_token, reduction, dense_cache_bytes, latent_cache_bytes
    teacher_loss, student_loss, converted_loss (before distillation), loss_increase
    velocity_rel_error, velocity_rel_error_by_timestep [[t, error], ...] with t in [0, 1]
    attention_rel_error [one a layer]
    accuracy {teacher: {"1x": ...}, student: {...}}, digits_bench (see `digits_bench.py`)
    seconds {convert, distill, evaluate, total}
    curves [{stage, step, loss, heldout_loss}, ...], plan (what `plan --json` prints)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..files import write_text
from . import bench_section, figures
from .memory import format_bytes
from .samples import Comparison, embed

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
_DASH, _MINUS, _SPACE = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


def write_report(folder: Path, report: Mapping[str, Any], comparisons: Sequence[Comparison] = ()) -> Path:
    """Write `report.json` and `report.html` into `folder`; returns the page's path.

    Numbers that are not finite become null in the JSON and are named under `not_finite`, on the page
    too. Equal input gives equal bytes. Raises UserError when the disk is full.
    """
    clean = finite(report)
    write_text(folder / REPORT_JSON, json.dumps(clean, indent=2, sort_keys=True, allow_nan=False) + "\n")
    page = folder / REPORT_HTML
    write_text(page, render_html(clean, comparisons))
    return page


def finite(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as plain JSON values; numbers that are not finite become None, listed by path under `not_finite`."""
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
    """The page of a report whose numbers are finite or None."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mla_convert.evaluate", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=_title(report),
        subtitle=_subtitle(report.get("layout") or {}),
        verdict=_verdict(report),
        not_finite=report.get("not_finite", []),
        tiles=_tiles(report),
        rows=_rows(report),
        seconds=_seconds(report.get("seconds") or {}),
        bars=_bars(report),
        charts=_charts(report),
        bench=bench_section.tables(report["digits_bench"]) if _has(report, "digits_bench") else [],
        comparisons=[embed(comparison) for comparison in comparisons],
        layout={key: _plain(value) for key, value in (report.get("layout") or {}).items()},
        recipe=report.get("recipe") or "",
        versions={key: str(value) for key, value in (report.get("versions") or {}).items()},
    )


def _has(report: Mapping[str, Any], *keys: str) -> bool:
    return all(report.get(key) is not None for key in keys)


def _title(report: Mapping[str, Any]) -> str:
    return f"Conversion of {report['source']}" if report.get("source") else "Conversion report"


def _subtitle(layout: Mapping[str, Any]) -> list[str]:
    names = {"position": "{}", "own_chunk": "own chunk {}", "kv_lora_rank": "rank {}"}
    return [text.format(_brief(layout[key])) for key, text in names.items() if layout.get(key) is not None]


def _verdict(report: Mapping[str, Any]) -> str:
    if not _has(report, "dense_scalars_per_token", "latent_scalars_per_token", "reduction"):
        return ""
    text = (
        f"Each layer of the converted model caches {report['latent_scalars_per_token']:,g} numbers a token where "
        f"its teacher caches {report['dense_scalars_per_token']:,g}: {_percent(report['reduction'])} less memory"
    )
    increase = report.get("loss_increase")
    if increase is None:
        return text + "."
    side = "above" if increase >= 0 else "below"
    return f"{text}, for a held-out loss {_percent(abs(increase))} {side} the teacher's."


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers a reader should leave with."""
    tiles = []
    if _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        dense, latent = report["dense_cache_bytes"], report["latent_cache_bytes"]
        note = f"{_bytes(latent)} instead of {_bytes(dense)}"
        tiles.append({"value": f"{dense / latent:.1f}×", "label": "smaller cache", "note": note})
    if _has(report, "loss_increase"):
        note = ""
        if _has(report, "teacher_loss", "student_loss"):
            note = f"{report['student_loss']:.4f} against {report['teacher_loss']:.4f}"
        tiles.append({"value": _signed(report["loss_increase"]), "label": "held-out loss", "note": note})
    for length, teacher, student in _accuracies(report)[-1:]:
        if student is not None:
            note = f"teacher {_percent(teacher)}" if teacher is not None else ""
            tiles.append({"value": _percent(student), "label": f"digits recognised at {_length(length)}", "note": note})
    total = (report.get("seconds") or {}).get("total")
    if total is not None:
        tiles.append({"value": _duration(total), "label": "from source to report", "note": ""})
    return tiles


def _rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The comparison table: what, teacher, student, change."""
    rows: list[dict[str, str]] = []

    def add(name: str, teacher: str, student: str, change: str = "") -> None:
        rows.append({"name": name, "teacher": teacher, "student": student, "change": change})

    if _has(report, "dense_scalars_per_token", "latent_scalars_per_token"):
        dense, latent = report["dense_scalars_per_token"], report["latent_scalars_per_token"]
        add("Cached scalars a token", f"{dense:,g}", f"{latent:,g}", _signed(latent / dense - 1))
    if _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        dense, latent = report["dense_cache_bytes"], report["latent_cache_bytes"]
        add("Cache of one stream", _bytes(dense), _bytes(latent), _signed(latent / dense - 1))
    plan = report.get("plan")
    if plan:
        dense, latent = plan["max_streams_dense"], plan["max_streams_latent"]
        change = f"{latent / dense:.1f}×" if dense else ""
        add(f"Streams on {plan['gpu']}", f"{dense:,}", f"{latent:,}", change)
    teacher_loss = report.get("teacher_loss")
    for name, key in (("Loss before distillation", "converted_loss"), ("Held-out loss", "student_loss")):
        if report.get(key) is not None:
            loss = report[key]
            change = _signed(loss / teacher_loss - 1) if teacher_loss else ""
            add(name, f"{teacher_loss:.4f}" if teacher_loss else _DASH, f"{loss:.4f}", change)
    if _has(report, "velocity_rel_error"):
        add("Velocity error", _DASH, _percent(report["velocity_rel_error"]))
    for length, teacher, student in _accuracies(report):
        change = "" if teacher is None or student is None else _points(student - teacher)
        add(f"Digits recognised at {_length(length)}", _share(teacher), _share(student), change)
    return rows


def _accuracies(report: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """`(length, teacher, student)` from short to long."""
    accuracy = report.get("accuracy") or {}
    teacher, student = accuracy.get("teacher") or {}, accuracy.get("student") or {}
    lengths = sorted({*teacher, *student}, key=lambda text: float(text.rstrip("x")))
    return [(length, teacher.get(length), student.get(length)) for length in lengths]


def _seconds(seconds: Mapping[str, float]) -> str:
    parts = [f"{name} {_duration(value)}" for name, value in seconds.items() if name != "total" and value is not None]
    if seconds.get("total") is not None:
        parts.append(f"{_duration(seconds['total'])} in all")
    return ", ".join(parts)


def _bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        return []
    dense, latent = report["dense_cache_bytes"], report["latent_cache_bytes"]
    return [
        {"name": "dense", "kind": "teacher", "share": 100.0, "value": _bytes(dense)},
        {"name": "latent", "kind": "student", "share": 100 * latent / dense, "value": _bytes(latent)},
    ]


def _charts(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Charts by section: `{"distillation": [{title, note, svg}], ...}`."""
    charts: dict[str, list[dict[str, Any]]] = {"distillation": [], "memory": [], "error": [], "bench": []}

    def add(section: str, title: str, note: str, svg: str) -> None:
        charts[section].append({"title": title, "note": note, "svg": Markup(svg)})

    curves = report.get("curves") or []
    if any(row.get("heldout_loss") is not None for row in curves):
        svg = figures.heldout_loss(curves, report.get("teacher_loss"), report.get("converted_loss"))
        add("distillation", "Held-out loss", "On clips that were never trained on, same noise at every point.", svg)
    if any(row.get("loss") is not None for row in curves):
        add("distillation", "Training loss", "What the stage minimises.", figures.training_loss(curves))
    if _has(report, "dense_cache_bytes", "latent_cache_bytes"):
        if (report.get("plan") or {}).get("max_streams_latent"):
            note = "Weights, caches and working memory, computed."
            add("memory", "Memory by number of streams", note, figures.memory_by_streams(report["plan"]))
        else:
            svg = figures.cache_by_streams(report["dense_cache_bytes"], report["latent_cache_bytes"])
            add("memory", "Cache by number of streams", "Each stream keeps a full window.", svg)
    layers = [error for error in report.get("attention_rel_error") or [] if error is not None]
    if layers:
        worst = int(np.argmax(layers))
        note = f"Mean {_percent(float(np.mean(layers)))}, worst {_percent(layers[worst])} in layer {worst}."
        add("error", "Attention output by layer", note, figures.error_by_layer(layers))
    points = [(t, error) for t, error in report.get("velocity_rel_error_by_timestep") or [] if error is not None]
    if points:
        note = "Difference from the teacher's velocity, relative to its size."
        add("error", "Velocity by noise level", note, figures.error_by_timestep(points))
    if _has(report, "digits_bench"):
        note = "Share of the rollouts whose frame shows the prompted digit."
        add("bench", "Recognition over time", note, bench_section.recognition_by_frame(report["digits_bench"]))
    return charts


def _plain(value: Any) -> str:
    """A value of the layout; equal entries of a list are said once."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        return f"{_plain(value[0])} in each of {len(value)} layers" if len(value) > 1 else _plain(value[0])
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    return _DASH if value is None else str(value)


def _brief(value: Any) -> str:
    """A value of the layout in a word or two; a list of numbers as its range."""
    if isinstance(value, list) and value and all(isinstance(entry, int | float) for entry in value):
        low, high = min(value), max(value)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return _plain(value)


def _length(text: str) -> str:
    """`1x`, the length of a training clip, and its multiples."""
    return "training length" if text == "1x" else f"{text.rstrip('x')}× length"


def _bytes(count: float) -> str:
    return format_bytes(count).replace(" ", _SPACE)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.2g}{_SPACE}%" if 0 < abs(percent) < 1 else f"{percent:.1f}{_SPACE}%"


def _share(share: float | None) -> str:
    return _DASH if share is None else _percent(share)


def _signed(share: float) -> str:
    return f"{_MINUS if share < 0 else '+'}{_percent(abs(share))}"


def _points(share: float) -> str:
    sign = _MINUS if share < 0 else "+"
    return f"{sign}{100 * abs(share):.1f} points"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
