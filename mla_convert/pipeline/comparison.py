"""Reads finished runs and writes the page that compares them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UsageError, UserError
from ..evaluate.compare import MAX_RUNS, Run, render_comparison
from ..evaluate.report import REPORT_JSON
from ..evaluate.samples import Comparison
from ..export.run_folder import evaluation_of, last_stage
from ..files import check_place, write_text
from ..run.video import to_frames
from .context import CHECKPOINT, ROLLOUTS, SAMPLES


def compare_runs(folders: Sequence[Path], out: Path) -> list[Run]:
    """Compare the runs in `folders` and write the page `out`; returns the runs.

    Each folder is a run folder or has a `report.json` from `evaluate`. Raises UsageError for too few or too many
    folders or an `out` that is not an .html file, UserError for a folder without a readable report.
    """
    if not 2 <= len(folders) <= MAX_RUNS:
        raise UsageError(f"compare takes 2 to {MAX_RUNS} runs, not {len(folders)}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"cannot write {out}; give a name that ends in .html")
    check_place(out)
    reports = [_read_report(folder) for folder in folders]
    names = _names(folders, reports)
    runs = [
        Run(name, str(folder), report, read_samples(folder, report))
        for name, folder, report in zip(names, folders, reports, strict=True)
    ]
    write_text(out, render_comparison(runs))
    return runs


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_JSON
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of a finished run") from None
        stage = last_stage(folder)
        if stage is not None and not (folder / CHECKPOINT).is_dir():
            raise UserError(
                f"the run in {folder} is not finished and has no {REPORT_JSON}; finish it with `mla-convert run --out "
                f"{folder} --resume`, or write one with `evaluate {stage}` and give {evaluation_of(stage)}"
            ) from None
        raise UserError(
            f"{folder} has no {REPORT_JSON}; finish the run, or write one with `evaluate {folder}` and give the folder "
            "that it names"
        ) from None
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read; write it again with `evaluate {folder}`") from None
    if not isinstance(report, dict):
        raise UserError(f"{path} is not a report of mla-convert; give the folder of a finished run")
    return report


def _names(folders: Sequence[Path], reports: Sequence[dict[str, Any]]) -> list[str]:
    """Distinct names: the runs' own, else those of their folders, else the paths as given."""
    own = [str(report.get("name") or folder.resolve().name) for folder, report in zip(folders, reports, strict=True)]
    for names in (own, [folder.resolve().name for folder in folders], [str(folder) for folder in folders]):
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"{folders[0]} is given twice; compare different runs")


def read_samples(folder: Path, report: dict[str, Any]) -> list[Comparison]:
    """The samples of a run; empty if it has none or if they are latents, which would need a VAE."""
    path = folder / SAMPLES / ROLLOUTS
    if not path.is_file() or not report.get("recipe"):
        return []
    generate = yaml.safe_load(report["recipe"]).get("generate") or {}
    try:
        videos = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the samples {path}: {error}; resume the run to make them again") from None
    if videos["student"].shape[1] not in (1, 3):
        return []
    return [
        Comparison(prompt, to_frames(teacher), to_frames(student), generate["fps"])
        for prompt, teacher, student in zip(generate["prompts"], videos["teacher"], videos["student"], strict=True)
    ]
