"""Finds the held-out clips on which a converted model has the largest error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distill.data import Data, DigitClips, LatentClips
from ..distill.objective import NoisedClips
from ..run.video import to_frames
from ..zoo.digits.data import prompt_of
from .samples import film_strips

WORST = 4
GAIN = 20
"""Amplification of the difference in a film strip."""


def heldout_prompts(data: Data, clips: Tensor) -> list[str]:
    """The prompts of the held-out clips, whose embeddings are `clips` `[N, L, D]`; "" if unknown."""
    if isinstance(data, DigitClips):
        return [str(prompt_of(embedding)) for embedding in clips]
    if isinstance(data, LatentClips):
        return data.heldout_prompts(len(clips))
    return [""] * len(clips)


class ClipErrors:
    """Collects velocity error and loss of every clip, and the predictions of the `worst` ones if they are pixels."""

    def __init__(self, worst: int = WORST) -> None:
        self.worst = worst
        self.rows: list[dict[str, float]] = []
        self._kept: dict[int, dict[str, Tensor]] = {}

    def add(self, inputs: NoisedClips, expected: Tensor, actual: Tensor) -> None:
        """Add the next clips, with the velocities `[B, C, F, H, W]` of teacher (`expected`) and student (`actual`)."""
        first = len(self.rows)

        def mean(x: Tensor) -> list[float]:
            found: list[float] = x.double().square().mean((1, 2, 3, 4)).tolist()
            return found

        measured = zip(
            mean(actual - expected),
            mean(expected),
            mean(expected - inputs.target),
            mean(actual - inputs.target),
            strict=True,
        )
        for error, energy, teacher, student in measured:
            self.rows.append(
                {
                    "velocity_rel_error": (error / max(energy, 1e-30)) ** 0.5,
                    "teacher_loss": teacher,
                    "student_loss": student,
                    "loss_increase": student / max(teacher, 1e-30) - 1,
                }
            )
        if expected.shape[1] not in (1, 3):
            return
        t = inputs.t[:, None, :, None, None]
        # The clean clip that a velocity implies: x_t = (1 - t) x + t noise and v = noise - x.
        teacher_x, student_x = (inputs.x_t - t * velocity for velocity in (expected, actual))
        clean = inputs.x_t - t * inputs.target
        worst = set(self.order()[: self.worst])
        self._kept = {index: kept for index, kept in self._kept.items() if index in worst}
        for index in worst:
            if index >= first:
                own = index - first
                self._kept[index] = {
                    "clip": clean[own].cpu(),
                    "teacher": teacher_x[own].cpu(),
                    "student": student_x[own].cpu(),
                }

    def order(self) -> list[int]:
        """Clip indices by descending velocity error, NaN first."""
        errors = [row["velocity_rel_error"] for row in self.rows]
        return sorted(range(len(errors)), key=lambda index: -np.nan_to_num(errors[index], nan=np.inf))

    def result(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The number of `clips`, the `median` and `p95` of their velocity errors, and the `worst` clips.

        Each worst clip has its number `clip`, its `prompt`, its errors and losses, and for pixels `pictures`: film
        strips of the clip, of each model's estimate of it from the noised clip, and of their difference.
        """
        errors = [row["velocity_rel_error"] for row in self.rows]
        worst = []
        for index in self.order()[: self.worst]:
            found: dict[str, Any] = {"clip": index, "prompt": prompts[index], **self.rows[index]}
            if index in self._kept:
                found["pictures"] = _pictures(self._kept[index])
            worst.append(found)
        return {
            "clips": len(errors),
            "median": float(np.median(errors)),
            "p95": float(np.percentile(errors, 95)),
            "worst": worst,
        }


def _pictures(kept: dict[str, Tensor]) -> dict[str, Any]:
    videos = {name: to_frames(torch.nan_to_num(video)) for name, video in kept.items()}
    difference = GAIN * np.abs(videos["student"] - videos["teacher"])
    return film_strips({**videos, f"difference × {GAIN}": difference.clip(0, 1)})
