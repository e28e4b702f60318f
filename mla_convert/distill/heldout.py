"""Measures the held-out losses of a stage: the student's, and the dense teacher's beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .data import Batch
from .learner import Learner
from .metrics import Row
from .objective import flow_loss
from .runtime import autocast, free_memory
from .stages.base import TEACHER, StageConfig

TEACHER_LOSS = "teacher_heldout_loss"


class HeldOut:
    """The losses on held-out `clips`; without clips there are none.

    `teacher` is the dense model, if the run has one; it is among the learner's own networks if `shared`. In place of
    one that the run does not keep, `load_teacher` returns one to be measured and dropped.
    """

    def __init__(
        self,
        clips: Batch | None,
        config: StageConfig,
        learner: Learner,
        teacher: Any,
        load_teacher: Callable[[], Any] | None,
        shared: bool,
    ) -> None:
        self.clips, self.config, self.learner = clips, config, learner
        self.teacher, self.load_teacher, self.shared = teacher, load_teacher, shared
        self.teacher_loss: float | None = None

    def begin(self) -> Row:
        """Measure the teacher before the first step; entries of the first row. Every process calls this."""
        if self.clips is not None:
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
        """The teacher's loss; if the stage itself needs no teacher, only the first process loads and measures it."""
        if self.shared:
            # It may be sharded, and then every process must take part.
            loss: float = self.learner.measure(lambda models: self._loss(models[TEACHER], clips))
            return loss
        accelerator = self.learner.accelerator
        if not accelerator.is_main_process:
            return None
        teacher = self.teacher
        if teacher is None:
            if self.load_teacher is None:
                return None
            teacher = self.load_teacher()
        device_before = teacher.device
        with autocast(accelerator.device, self.config.mixed_precision):
            loss = self._loss(teacher.to(accelerator.device), clips)
        if self.teacher is not None:
            teacher.to(device_before)
        del teacher
        free_memory()
        return loss

    def _loss(self, model: Any, clips: Batch) -> float:
        """The loss of `model`, `batch_size` clips per forward, as many as fit in training."""
        return flow_loss(model, clips, forward_size=self.config.batch_size, levels=self.config.noise_levels)
