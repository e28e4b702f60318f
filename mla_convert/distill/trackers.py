"""Where a stage's curves and pictures go: tensorboard, wandb or trackio, by Accelerate."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from ..errors import UserError
from .stages.base import StageConfig

PROJECT = "mla-convert"


def tracker_names(config: StageConfig) -> list[str]:
    """The trackers of a stage, each once."""
    chosen = config.tracker
    return list(dict.fromkeys([chosen] if isinstance(chosen, str) else chosen or ()))


def check_trackers(config: StageConfig) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in tracker_names(config):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker: {name} needs the package {name}, which is not installed: pip install {name}")


@contextlib.contextmanager
def tracking(accelerator: Accelerator, config: StageConfig, work_dir: Path, first: int) -> Iterator[None]:
    """Log to the stage's trackers from step `first` on; tensorboard forgets what it had seen after that step.

    wandb works offline unless WANDB_MODE says otherwise (`wandb sync` sends its files later), trackio
    keeps its runs on this machine.
    """
    names = tracker_names(config)
    if names:
        run = f"{work_dir.parent.parent.name}-{work_dir.name}"
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": first + 1},
            "wandb": {"name": run, "dir": str(work_dir), "mode": os.environ.get("WANDB_MODE", "offline")},
            "trackio": {"name": run, "resume": "allow"},
        }
        # The project is the name of tensorboard's folder.
        project = "tensorboard" if names == ["tensorboard"] else PROJECT
        accelerator.init_trackers(project, init_kwargs={name: options[name] for name in names})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def log_picture(accelerator: Accelerator, name: str, picture: NDArray[np.uint8], step: int) -> None:
    """Show a picture `[H, W, 3]` in the trackers that take pictures: tensorboard and wandb."""
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: picture[None]}, step=step, **options)
