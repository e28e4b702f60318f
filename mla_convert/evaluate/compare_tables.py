"""Builds the tables of a comparison of runs: scalars, Digits-Bench, recipe differences and warnings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from ..errors import UserError
from ..sizes import duration
from .digits_section import METRICS, cell, length_title
from .figures import curve_of
from .text import DASH, bytes_text, length_text, percent, plain, points_text, signed, times_training
from .vbench_section import TOTALS
from .vbench_suite import DIMENSIONS

_LOSSES = _BEFORE, _AFTER, _INCREASE = "Loss before distillation", "Held-out loss", "Held-out loss increase"

Report = Mapping[str, Any]
Cell = dict[str, Any]


class Row(NamedTuple):
    """One row of the table of scalars.

    `write` formats a value. `student` reads a run's value from its report, `teacher` its teacher's. `change`
    formats the difference from the first run. `better` is -1 if lower is better, 1 if higher is, 0 if neither.
    """

    name: str
    write: Callable[[Any], str]
    student: Callable[[Report], Any]
    teacher: Callable[[Report], Any] | None = None
    change: Callable[[Any, Any], str] | None = None
    better: int = 0


def scalars(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Rows with `name`, `teacher` and one cell per run: `value`, `change` from the first run, `best`.

    The teacher's value is that of the first run that has one. A row without any value is left out. No held-out loss is
    best where the teacher's differs.
    """
    found = []
    same = _same_teacher_loss(reports)
    for row in _rows(reports):
        values = [_try(row.student, report) for report in reports]
        if all(value is None for value in values):
            continue
        teacher = None
        if row.teacher is not None:
            teacher = next((v for report in reports if (v := _try(row.teacher, report)) is not None), None)
        known = [value for value in values if value is not None]
        best = None
        if row.better and (same or row.name not in _LOSSES) and len(known) > 1 and min(known) != max(known):
            best = max(known) if row.better > 0 else min(known)
        cells = [
            {
                "value": DASH if value is None else row.write(value),
                "change": _change(row, values[0], value) if number else "",
                "best": best is not None and value == best,
            }
            for number, value in enumerate(values)
        ]
        found.append({"name": row.name, "teacher": DASH if teacher is None else row.write(teacher), "cells": cells})
    return found


def _rows(reports: Sequence[Report]) -> Iterator[Row]:
    def relative(old: Any, new: Any) -> str:
        return signed(new / old - 1) if old else ""

    def loss(value: float) -> str:
        return f"{value:.4f}"

    def count(value: float) -> str:
        return f"{value:,g}"

    yield Row(
        "Cached scalars per token per layer",
        count,
        lambda r: r["latent_scalars_per_token"],
        lambda r: r["dense_scalars_per_token"],
        relative,
        -1,
    )
    yield Row(
        "Cache of one stream",
        bytes_text,
        lambda r: r["latent_cache_bytes"],
        lambda r: r["dense_cache_bytes"],
        relative,
        -1,
    )
    yield Row(_BEFORE, loss, lambda r: r["converted_loss"], lambda r: r["teacher_loss"], relative, -1)
    yield Row(_AFTER, loss, lambda r: r["student_loss"], lambda r: r["teacher_loss"], relative, -1)
    yield Row(_INCREASE, signed, lambda r: r["loss_increase"], None, _points, -1)
    yield Row("Velocity error", percent, lambda r: r["velocity_rel_error"], None, relative, -1)
    yield Row("Attention error, worst layer", percent, lambda r: max(r["attention_rel_error"]), None, relative, -1)
    yield Row(
        "Attention map difference, worst head",
        percent,
        lambda r: max(max(layer["total_variation"]) for layer in r["attention_maps"]),
        None,
        relative,
        -1,
    )
    lengths = {length for report in reports for side in (report.get("accuracy") or {}).values() for length in side}
    for length in sorted(lengths, key=times_training):
        yield Row(
            f"Digits recognized at {length_text(length)}",
            percent,
            lambda r, length=length: r["accuracy"]["student"][length],  # type: ignore[misc]
            lambda r, length=length: r["accuracy"]["teacher"][length],  # type: ignore[misc]
            _points,
            1,
        )
    scored = {name for report in reports for name in (report.get("vbench") or {}).get("scores", {})}
    for key in (*(name for name in DIMENSIONS if name in scored), *TOTALS):
        yield Row(
            f"VBench: {TOTALS.get(key, key.replace('_', ' ')).lower()}",
            lambda value: f"{value:.4f}",
            lambda r, key=key: r["vbench"]["scores"][key]["score"] if key in scored else r["vbench"]["totals"][key],  # type: ignore[misc]
            None,
            relative,
            1,
        )
    yield Row("Training steps", count, _steps)
    yield Row("Total time", duration, lambda r: r["seconds"]["total"])


def _points(old: float, new: float) -> str:
    return points_text(new - old)


def _steps(report: Report) -> float | None:
    """The training steps of all stages together."""
    steps, _, _ = curve_of(report.get("curves") or [], "step")
    return steps[-1] if steps else None


def _try(read: Callable[[Report], Any], report: Report) -> Any:
    """`read(report)`, or None if the report lacks the value."""
    try:
        return read(report)
    except (KeyError, TypeError, ValueError):
        return None


def _change(row: Row, first: Any, value: Any) -> str:
    if row.change is None or first is None or value is None or first == value:
        return ""
    return row.change(first, value)


def bench_tables(benches: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """One table per length that any run has: `title`, and `rows` of cells for real, teacher and each run.

    A cell is `apart` if its 95 % interval does not overlap that of the first run.
    """
    known = [bench for bench in benches if bench is not None]
    lengths = {length: bench for bench in reversed(known) for length in bench["lengths"]}
    tables = []
    for length in sorted(lengths, key=times_training):
        rows = []
        for metric, (name, kind) in METRICS.items():
            shared = lengths[length]["lengths"][length]
            cells: list[Cell] = [
                {**cell(shared[source].get(metric), kind), "apart": False} for source in ("real", "teacher")
            ]
            values = [_estimate(bench, length, metric) for bench in benches]
            for value in values:
                cells.append({**cell(value, kind), "apart": _apart(values[0], value)})
            rows.append({"name": name, "cells": cells})
        tables.append({"title": length_title(known[0], length), "rows": rows})
    return tables


def _estimate(bench: Mapping[str, Any] | None, length: str, metric: str) -> Mapping[str, float] | None:
    if bench is None or length not in bench["lengths"]:
        return None
    found: Mapping[str, float] | None = bench["lengths"][length]["student"].get(metric)
    return found


def _apart(first: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    if first is None or other is None or None in (first["low"], other["low"]):
        return False
    return bool(first["high"] < other["low"] or other["high"] < first["low"])


def differences(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The keys in which the recipes differ, with one value per run; empty if a run has no recipe.

    Raises UserError for a recipe with aliases, which a few lines can make endless.
    """
    recipes = [str(report.get("recipe") or "") for report in reports]
    if not all(recipes):
        return []
    if any(isinstance(event, yaml.AliasEvent) for recipe in recipes for event in yaml.parse(recipe)):
        raise UserError("the recipe in a report has YAML aliases, which mla-convert never writes; leave that run out")
    flat = [dict(_flatten(yaml.safe_load(recipe))) for recipe in recipes]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    return [
        {"key": key, "values": [_written(recipe.get(key)) for recipe in flat]}
        for key in keys
        if key != "name" and any(recipe.get(key) != flat[0].get(key) for recipe in flat)
    ]


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flatten(inner, f"{path}[{number}]")
    else:
        yield path, value


def _written(value: Any) -> str:
    return plain(value) if isinstance(value, list) else DASH if value is None else json.dumps(value).strip('"')


def _same_teacher_loss(reports: Sequence[Report]) -> bool:
    losses = [report["teacher_loss"] for report in reports if report.get("teacher_loss") is not None]
    return not losses or max(losses) <= min(losses) * (1 + 1e-6)


def warnings(reports: Sequence[Report]) -> list[str]:
    """The reasons why some numbers are not comparable, one sentence each."""
    found = []
    sources = [report.get("source") for report in reports]
    if len(set(map(str, sources))) > 1:
        found.append(f"The runs have different teachers: {', '.join(map(str, sources))}.")
    if not _same_teacher_loss(reports):
        found.append(
            "The teacher's held-out loss is not the same in all runs: the clips, the noise or the device differ."
        )
    settings = [
        (bench["prompts"], bench["seeds"]) for report in reports if (bench := report.get("digits_bench")) is not None
    ]
    if len(set(settings)) > 1:
        sizes = ", ".join(f"{prompts} prompts x {seeds} seeds" for prompts, seeds in settings)
        found.append(f"Digits-Bench was run at different sizes: {sizes}.")
    return found
