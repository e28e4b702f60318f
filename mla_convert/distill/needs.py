"""Checks that a run has what a stage needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .data import Data
from .launch import world_size
from .stages.base import Stage, StageConfig


def check_needs(stage: Stage[Any], student: Any, networks: Mapping[str, Any], data: Data) -> None:
    """Raise UserError, in one line, if the run lacks what `stage` needs.

    A run calls this before it starts, with models on the meta device, and the trainer before the stage starts.
    """
    config: StageConfig = stage.config
    missing = [name for name in stage.needed if name not in networks]
    if missing:
        raise UserError(f"stage {config.stage} needs the network {', '.join(missing)}, which this run does not have")
    if student.causal.window_frames is None:
        if config.rolls_out:
            raise UserError(
                f"stage {config.stage} rolls out with a cache and needs a finite window; set causal.window_frames"
            )
        if config.preview is not None:
            raise UserError(f"stage {config.stage}: preview needs a finite window; set causal.window_frames")
    if data.size is not None and data.size < world_size():
        raise UserError(f"{world_size()} processes share {data.size} clips; use fewer processes or more data")
    _check_conditions([student, *networks.values()], data)
    stage.check(student, networks, data)


def _check_conditions(models: list[Any], data: Data) -> None:
    """Raise UserError if the clips lack a condition that one of the models needs."""
    needed = {name for model in models for name in getattr(model, "needed_conditions", ())}
    missing = sorted(needed - data.example(0).keys()) if needed else []
    if missing:
        raise UserError(
            f"the models are conditioned on {' and '.join(missing)}, which the clips do not hold; pass these "
            "conditions to open_data"
        )
