"""Measures the held-out losses of a stage: the student's, and the dense teacher's beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .data import Batch
from .learner import Learner
from .metrics import Row
from .objective import flow_loss
from .runtime import autocast
from .stages.base import TEACHER, StageConfig

TEACHER_LOSS = "teacher_heldout_loss"


class HeldOut:
    """The losses on held-out `clips`; without clips there are none.

    `teacher` is the dense model, if the run has one; it is among the learner's own networks if `shared`.
    """

    def __init__(self, clips: Batch | None, config: StageConfig, learner: Learner, teacher: Any, shared: bool) -> None:
        self.clips, self.config, self.learner, self.teacher, self.shared = clips, config, learner, teacher, shared
        self.teacher_loss: float | None = None

    def begin(self) -> Row:
        """Measure the teacher before the first step; entries of the first row. Every process calls this."""
        if self.clips is not None and self.teacher is not None:
            self.teacher_loss = self._measure_teacher(self.clips)
        return {} if self.teacher_loss is None else {TEACHER_LOSS: self.teacher_loss}

    def resume(self, rows: Sequence[Row]) -> None:
        """Read the teacher's loss back from the `rows` of an earlier process."""
        self.teacher_loss = rows[0].get(TEACHER_LOSS) if rows else None

    def measure(self) -> Row:
        """The loss of the weights that the stage would end with. Every process computes all of it."""
        clips = self.clips
        if clips is None:
            return {}
        loss = self.learner.measure_final(lambda student: self._loss(student, clips))
        return {"heldout_loss": loss} | ({"heldout_ratio": loss / self.teacher_loss} if self.teacher_loss else {})

    def _measure_teacher(self, clips: Batch) -> float | None:
        """The teacher's loss; only in the first process if the stage itself needs no teacher."""
        if self.shared:
            # It may be sharded, and then every process must take part.
            loss: float = self.learner.measure(lambda models: self._loss(models[TEACHER], clips))
            return loss
        accelerator = self.learner.accelerator
        if not accelerator.is_main_process:
            return None
        device_before = self.teacher.device
        with autocast(accelerator.device, self.config.mixed_precision):
            loss = self._loss(self.teacher.to(accelerator.device), clips)
        self.teacher.to(device_before)
        return loss

    def _loss(self, model: Any, clips: Batch) -> float:
        """The loss of `model`, `batch_size` clips per forward, as many as fit in training."""
        return flow_loss(model, clips, forward_size=self.config.batch_size, levels=self.config.noise_levels)
