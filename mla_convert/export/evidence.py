"""Collects the evidence of a checkpoint: the resolved recipe, the report, benchmark results and samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..files import RESOLVED_RECIPE
from ..load import read_json
from .run_folder import evaluation_of, is_run

RECIPE, REPORT, PAGE, BENCH, SAMPLES = RESOLVED_RECIPE, "report.json", "report.html", "bench.json", "samples"
MAX_SAMPLES = 4


@dataclass(frozen=True)
class Evidence:
    """The evaluation report, the result of `mla-convert bench`, the `files` of both, and sample videos."""

    report: dict[str, Any] | None = None
    bench: dict[str, Any] | None = None
    files: tuple[Path, ...] = ()
    samples: tuple[Path, ...] = ()


def find_evidence(root: Path) -> Evidence:
    """Find the report, benchmark and samples of the checkpoint `root`: in its run, in itself, or by `evaluate`.

    Raises UserError for a report that cannot be read.
    """
    places = [root, evaluation_of(root)]
    if is_run(root.parent):
        places = [root.parent, evaluation_of(root), root]
    measured = next((place for place in places if (place / REPORT).is_file()), root)
    timed = next((place for place in places if (place / BENCH).is_file()), root)
    files = [file for file in (measured / REPORT, measured / PAGE, timed / BENCH) if file.is_file()]
    report, bench = (read_json(file) if file.is_file() else None for file in (measured / REPORT, timed / BENCH))
    videos = next((place / SAMPLES for place in places if (place / SAMPLES).is_dir()), None)
    found = [] if videos is None else sorted(file for file in videos.iterdir() if file.suffix == ".mp4")
    return Evidence(report, bench, tuple(files), tuple(found[:MAX_SAMPLES]))


def write_evidence(folder: Path, evidence: Evidence, recipe: Mapping[str, Any] | None) -> None:
    """Copy the evidence into `folder`, and write the resolved `recipe` if there is one."""
    for file in evidence.files:
        shutil.copyfile(file, folder / file.name)
    if evidence.samples:
        (folder / SAMPLES).mkdir()
    for file in evidence.samples:
        shutil.copyfile(file, folder / SAMPLES / file.name)
    if recipe:
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        (folder / RECIPE).write_text(text, encoding="utf-8")
