"""Tells which run folder a checkpoint is in."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import RUN_STATE

STAGES = "stages"
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
