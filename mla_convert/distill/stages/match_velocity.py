"""Regresses the student's velocity on the frozen dense teacher's, on noised data.

Both models see the same `x_t`, noise levels and history. The target therefore lacks the variance of the
flow-matching target.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...flow import noise_levels, velocity_error
from ...sampling import DenoisingSteps
from ..data import Batch
from ..objective import predict_velocity
from .base import TEACHER, Models, Stage
from .noised import NoisedStageConfig, noised_batch


class MatchVelocityConfig(NoisedStageConfig):
    """Keys of `match_velocity`, in addition to those of stages on noised data.

    `teacher_weight` is the share of the teacher's velocity in the loss; the rest is the data's own. `denoising_steps`,
    falling noise levels out of 1000 before the shift, restricts the stage and its held-out loss to these levels, for
    few-step teachers that know no others (Self-Forcing, Causal-Forcing, LongLive).
    """

    stage: Literal["match_velocity"] = "match_velocity"
    teacher_weight: float = Field(1.0, ge=0, le=1)
    denoising_steps: DenoisingSteps | None = None

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        return noise_levels(self.denoising_steps, self.timestep_shift)


class MatchVelocity(Stage[MatchVelocityConfig]):
    """The loss is `w |v_student - v_teacher|^2 + (1 - w) |v_student - (eps - x_0)|^2`, means over all elements.

    For a flow map, the second term is a mean over only the frames with r = t.
    """

    name = "match_velocity"
    config_class = MatchVelocityConfig

    @property
    def networks(self) -> tuple[str, ...]:
        return (TEACHER,) if self.config.teacher_weight > 0 else ()

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config, student = self.config, models["student"]
        clips = noised_batch(config, batch, student, generator, self.negative)
        if config.teacher_weight == 0:
            # The data gives only the velocity at r = t.
            clips = clips._replace(r=None)
        velocity = predict_velocity(student, clips)
        data_loss = velocity_error(velocity, clips.target, clips.t, clips.r)
        logs = {"data_loss": data_loss.detach()}
        if config.teacher_weight == 0:
            return data_loss, logs
        with torch.no_grad():
            target = predict_velocity(models[TEACHER], clips)
        teacher_loss = F.mse_loss(velocity, target)
        logs["teacher_loss"] = teacher_loss.detach()
        return torch.lerp(data_loss, teacher_loss, config.teacher_weight), logs


STAGE = MatchVelocity
