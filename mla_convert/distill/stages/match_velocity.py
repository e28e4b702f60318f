"""Regress the student's velocity on the frozen dense teacher's, on noised data.

Both models see the same `x_t`, noise levels and history, so that the target carries none of the
variance of flow matching's own.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...flow import drop_prompts
from ..data import Batch
from ..objective import noised_clips, predict_velocity
from .base import Models, Stage, StageConfig


class MatchVelocityConfig(StageConfig):
    """Keys of `match_velocity`.

    `copies` noisy versions of each clip share one forward. `timestep_shift` warps the noise levels
    (5 for Wan). `context: clean` is teacher forcing, every chunk sees clean history with up to
    `context_noise` of noise; `noisy` is the plain block-causal forward. `empty_prompt_rate` of the
    clips lose their prompt, for models that are sampled with guidance. `teacher_weight` is the share
    of the teacher's velocity in the loss, the rest is the data's own.
    """

    stage: Literal["match_velocity"] = "match_velocity"
    copies: int = Field(1, ge=1)
    timestep_shift: float = Field(1.0, gt=0)
    context: Literal["clean", "noisy"] = "clean"
    context_noise: float = Field(0.0, ge=0, le=1)
    empty_prompt_rate: float = Field(0.0, ge=0, le=1)
    teacher_weight: float = Field(1.0, ge=0, le=1)


class MatchVelocity(Stage[MatchVelocityConfig]):
    """`w |v_student - v_teacher|^2 + (1 - w) |v_student - (eps - x_0)|^2`, means over all elements."""

    name = "match_velocity"
    config_class = MatchVelocityConfig

    @property
    def networks(self) -> tuple[str, ...]:
        return ("teacher",) if self.config.teacher_weight > 0 else ()

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config, student = self.config, models["student"]
        clips = noised_clips(
            batch["latents"],
            drop_prompts(batch["encoder_hidden_states"], config.empty_prompt_rate, generator),
            student.causal,
            generator,
            copies=config.copies,
            shift=config.timestep_shift,
            clean_history=config.context == "clean",
            context_noise=config.context_noise,
        )
        velocity = predict_velocity(student, clips)
        data_loss = F.mse_loss(velocity, clips.target)
        logs = {"data_loss": data_loss.detach()}
        if config.teacher_weight == 0:
            return data_loss, logs
        with torch.no_grad():
            target = predict_velocity(models["teacher"], clips)
        teacher_loss = F.mse_loss(velocity, target)
        logs["teacher_loss"] = teacher_loss.detach()
        return torch.lerp(data_loss, teacher_loss, config.teacher_weight), logs


STAGE = MatchVelocity
