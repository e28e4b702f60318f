"""Renders one page that compares several finished runs. The page opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from ..charts import RUNS
from . import compare_figures as figures
from . import compare_tables as tables
from .figures import teacher_level
from .page import render_page
from .samples import Comparison, embed_video, film_strips
from .text import layout_parts, signed

MAX_RUNS = len(RUNS)


@dataclass(frozen=True)
class Run:
    """One run: its name on the page, its folder, its `report.json`, and its samples if the model generates pixels."""

    name: str
    folder: str
    report: Mapping[str, Any]
    samples: Sequence[Comparison] = ()


def render_comparison(runs: Sequence[Run]) -> str:
    """The HTML page of two to `MAX_RUNS` runs; missing data is left out. Equal input gives equal text."""
    reports = [run.report for run in runs]
    benches = [report.get("digits_bench") for report in reports]
    return render_page(
        "compare.html.j2",
        title=_joined([run.name for run in runs], "against" if len(runs) == 2 else "and"),
        runs=[{"name": run.name, "folder": run.folder, "layout": _layout(run.report)} for run in runs],
        verdict=_verdict(runs),
        warnings=tables.warnings(reports),
        rows=tables.scalars(reports),
        samples=_samples(runs),
        bench=tables.bench_tables(benches) if any(benches) else [],
        charts=_charts(reports, benches),
        differences=tables.differences(reports),
    )


def _joined(names: Sequence[str], word: str) -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


def _layout(report: Mapping[str, Any]) -> str:
    return ", ".join(layout_parts(report.get("layout") or {}))


def _verdict(runs: Sequence[Run]) -> str:
    """Summarize cache sizes and losses in two sentences; "" if any run lacks one of them."""
    sizes = {run.name: run.report.get("latent_scalars_per_token") for run in runs}
    losses: dict[str, Any] = {run.name: run.report.get("loss_increase") for run in runs}
    if None in sizes.values() or None in losses.values():
        return ""
    order = sorted(losses, key=lambda name: losses[name])
    increases = ", ".join(f"{signed(losses[name])} ({name})" for name in order)
    if len(set(sizes.values())) == 1:
        cached = f"{next(iter(sizes.values())):,g} in all runs"
    else:
        cached = ", ".join(f"{size:,g} ({name})" for name, size in sizes.items())
    return f"Numbers cached per token per layer: {cached}. Held-out loss relative to the teacher's: {increases}."


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The prompts that at least two runs sampled, with videos and film strips of the teacher and each run."""
    prompts = list(dict.fromkeys(sample.prompt for run in runs for sample in run.samples))
    found = []
    for prompt in prompts:
        drawn = {
            number: sample
            for number, run in enumerate(runs, start=1)
            for sample in run.samples
            if sample.prompt == prompt
        }
        shapes = {sample.student.shape for sample in drawn.values()}
        if len(drawn) < 2 or len(shapes) > 1:
            continue
        first = next(iter(drawn.values()))
        sources = [("teacher", 0, first.teacher)]
        if any(not np.array_equal(sample.teacher, first.teacher) for sample in drawn.values()):
            sources = [(f"teacher of {runs[number - 1].name}", 0, sample.teacher) for number, sample in drawn.items()]
        sources += [(runs[number - 1].name, number, sample.student) for number, sample in drawn.items()]
        found.append(
            {
                "prompt": prompt,
                "seconds": f"{len(first.student) / first.fps:.1f}",
                "cells": [
                    {"name": name, "run": number, **embed_video(frames, first.fps)} for name, number, frames in sources
                ],
                **film_strips({name: frames for name, _, frames in sources}),
            }
        )
    return found


def _charts(
    reports: Sequence[Mapping[str, Any]], benches: Sequence[Mapping[str, Any] | None]
) -> dict[str, list[dict[str, Any]]]:
    """The charts by section: `{"distillation": [{title, note, svg}], ...}`."""
    charts: dict[str, list[dict[str, Any]]] = {"distillation": [], "error": [], "bench": []}

    def add(section: str, title: str, note: str, svg: str) -> None:
        charts[section].append({"title": title, "note": note, "svg": Markup(svg)})

    def has_curve(key: str) -> bool:
        return any(row.get(key) is not None for report in reports for row in report.get("curves") or [])

    if has_curve("heldout_loss"):
        levels = [teacher_level(report.get("curves") or []) for report in reports]
        losses = [level for level in levels if level is not None]
        same = bool(losses) and max(losses) <= min(losses) * (1 + 1e-6)
        note = "On held-out clips" + ("; dashed: the teacher." if same else ".")
        add("distillation", "Held-out loss", note, figures.heldout_loss(reports, losses[0] if same else None))
    if has_curve("loss"):
        note = "Moving average of what each stage minimizes; comparable only between equal stages."
        add("distillation", "Training loss", note, figures.training_loss(reports))
    if any(report.get("attention_rel_error") for report in reports):
        note = "Relative error on the teacher's inputs."
        add("error", "Attention output by layer", note, figures.error_by_layer(reports))
    if any(report.get("velocity_rel_error_by_timestep") for report in reports):
        note = "Difference from the teacher's velocity, relative to the magnitude of the teacher's."
        add("error", "Velocity by noise level", note, figures.error_by_timestep(reports))
    if any(benches):
        note = "Share of rollouts that show the prompted digit in each frame; gray: the teacher."
        add("bench", "Recognition over time", note, figures.recognition_by_frame(benches))
    return charts
