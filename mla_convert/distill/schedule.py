"""Computes the learning rate from the step alone, so that there is no state to resume."""

from __future__ import annotations

import math

from .stages.base import StageConfig


def learning_rate(config: StageConfig, step: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then constant or falling to `min_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    lowest = config.min_learning_rate
    if config.schedule == "linear":
        return lowest + (config.learning_rate - lowest) * (1 - done)
    if config.schedule == "cosine":
        return lowest + (config.learning_rate - lowest) * (0.5 * (1 + math.cos(math.pi * done)))
    return config.learning_rate
