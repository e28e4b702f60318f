"""Tells which run folder a checkpoint is in, which one an unfinished run has, and where either is measured."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import MANIFEST, RUN_STATE

STAGES, EVALUATION = "stages", "evaluation"
_KEYS = {"format", "recipe_sha256", "steps"}


def is_run(folder: Path) -> bool:
    """Whether `folder` has the `state.json` of a run; other programs also write files of that name."""
    try:
        state = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.keys() >= _KEYS


def run_of(root: Path) -> Path | None:
    """The run folder of the checkpoint `root`, `RUN/checkpoint` or `RUN/stages/NAME`; None outside a run."""
    folder = root.parent.parent if root.parent.name == STAGES else root.parent
    return folder if is_run(folder) else None


def evaluation_of(root: Path) -> Path:
    """Where `evaluate` writes the report of the checkpoint `root`: apart from what its run has recorded.

    `RUN/evaluation`, `RUN/evaluation/NAME` for a stage of that name, or `root` itself outside a run.
    """
    run = run_of(root)
    if run is None:
        return root
    return run / EVALUATION / root.name if root.parent.name == STAGES else run / EVALUATION


def last_stage(run: Path) -> Path | None:
    """The checkpoint of the last stage that the run in `run` has finished; None before the conversion is."""
    written = sorted(file.parent for file in run.glob(f"{STAGES}/[0-9]*/{MANIFEST}"))
    return written[-1] if written else None
