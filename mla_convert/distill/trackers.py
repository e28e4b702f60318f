"""Logs a stage's curves and pictures to tensorboard, wandb or trackio through Accelerate."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from ..errors import UserError
from ..files import write_text
from .stages.base import StageConfig

PROJECT = "mla-convert"
WANDB_RUN = "wandb-run.txt"


def tracker_names(config: StageConfig) -> list[str]:
    """The trackers of a stage, without duplicates."""
    chosen = config.tracker
    return list(dict.fromkeys([chosen] if isinstance(chosen, str) else chosen or ()))


def check_trackers(config: StageConfig) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in tracker_names(config):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker: {name} needs the package {name}, which is not installed; pip install {name}")


@contextlib.contextmanager
def tracking(
    accelerator: Accelerator, config: StageConfig, work_dir: Path, first: int, owed: bool = False
) -> Iterator[None]:
    """Log to the stage's trackers from step `first` onward; tensorboard discards anything logged after that step.

    Of step `first` itself, the loss or the picture may still be `owed`. Without that and without further steps, no
    tracker is opened.

    wandb works offline unless WANDB_MODE says otherwise (`wandb sync` uploads the files later). trackio
    keeps its runs on this machine. A resumed stage continues its earlier run.
    """
    names = tracker_names(config) if first < config.steps or owed else []
    if names:
        run = f"{work_dir.parent.parent.name}-{work_dir.name}"
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": first + 1},
            "wandb": {"name": run, "dir": str(work_dir), "mode": os.environ.get("WANDB_MODE", "offline")},
            "trackio": {"name": run, "resume": "allow"},
        }
        if "wandb" in names and accelerator.is_main_process:
            options["wandb"] |= {"id": _run_id(work_dir), "resume": "allow"}
        # tensorboard uses the project as the name of its folder.
        project = "tensorboard" if names == ["tensorboard"] else PROJECT
        # stdout is for results, so the trackers' messages go to stderr.
        with contextlib.redirect_stdout(sys.stderr):
            accelerator.init_trackers(project, init_kwargs={name: options[name] for name in names})
    try:
        yield
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            for tracker in accelerator.trackers:
                _finish(tracker, accelerator.is_main_process)


def _finish(tracker: Any, main: bool) -> None:
    if tracker.name != "trackio":
        tracker.finish()
    elif main:
        # Only trackio's own finish() keeps it from ending the run again, with a message, when Python exits.
        importlib.import_module("trackio").finish()


def _run_id(work_dir: Path) -> str:
    """The wandb run ID of a stage, the same after every resume."""
    path = work_dir / WANDB_RUN
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


def log_picture(accelerator: Accelerator, picture: NDArray[np.uint8], step: int) -> None:
    """Log a picture `[H, W, 3]` to the trackers that take pictures: tensorboard and wandb."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"preview": picture[None]}, step=step, **options)
